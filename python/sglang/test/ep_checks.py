"""Checks of spread experts that raise when a rule of theirs is broken; over ranks that are threads."""

from __future__ import annotations

import unittest

import torch

from sglang.srt.distributed import ParallelState
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.factory import describe_experts
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.test.ep_world import MODEL, EpStep, run_rank, thread_world
from sglang.test.thread_ranks import run_ranks

CASE = unittest.TestCase()
MORI = {"moe_a2a_backend": "mori", "deepep_mode": "normal"}
LOW = {**MORI, "deepep_mode": "low_latency"}
GATHERED = {"moe_a2a_backend": "none"}


def poison_what_is_stale(experts: MoriEPMoE) -> None:
    """Fill the receive buffers with what must never be read."""
    batch = experts.dispatcher.transport._batch
    batch.hidden.fill_(torch.nan)
    batch.weights.fill_(torch.nan)
    batch.indices.fill_(2**31 - 1)


def build(world: int, groups: int, limit: int = 16, cap: int = 0, manual: int = 0, ep: int | None = None, **args):
    states = thread_world(world, groups, world if ep is None else ep)
    with (
        envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(limit),
        envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap),
        envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS.override(manual),
    ):
        layers = [MODEL.build(state, **args) for state in states]
    for experts in layers:
        if isinstance(experts, MoriEPMoE):
            poison_what_is_stale(experts)
    return states, layers


def compare(states: list[ParallelState], layers: list, step: EpStep) -> None:
    """Every rank's result of ``step`` against all experts in one place."""
    found = run_ranks(lambda rank: run_rank(layers[rank], states[rank], step), range(len(states)))
    for rows, state in zip(found, states):
        torch.testing.assert_close(rows, MODEL.truth(step, state.attn_dp_rank), rtol=1e-5, atol=1e-5)


def check_loads(args=MORI, **sizes) -> None:
    """Uneven, idle, all to one rank, padded; attention groups of one and two ranks."""
    for world, groups in ((2, 1), (4, 1), (2, 2), (4, 2), (4, 4)):
        if groups == 1 and args is GATHERED:
            continue
        states, layers = build(world, groups, **args, **sizes)
        for rows, real, only in (
            ([5, 3, 8, 1], None, None), ([0, 7, 0, 0], None, None), ([0, 0, 0, 0], None, None), ([1, 1, 1, 1], None, 0),
            ([6, 6, 6, 6], None, 5), ([6, 6, 6, 6], [2, 6, 0, 5], None), ([4, 4, 4, 4], [0, 0, 0, 1], 2),
        ):  # fmt: skip
            step = MODEL.step(rows[:groups], real and real[:groups], only, seed=world + groups)
            compare(states, layers, step)


def check_one_rank() -> None:
    for args in (MORI, LOW):
        states, layers = build(1, 1, **args)
        compare(states, layers, MODEL.step([7]))
        compare(states, layers, MODEL.step([7], [3]))


def check_capped() -> None:
    """A cap below the worst case: rounds, the same on all ranks, and nothing overflows."""
    for world, groups, cap in ((2, 2, 2), (4, 4, 9), (4, 2, 4), (2, 1, 3)):
        check = {"limit": 8, "cap": cap}
        for args in (MORI, LOW):
            states, layers = build(world, groups, **check, **args)
            for rows, only in (([8] * groups, None), ([8] * groups, 0), ([0] * (groups - 1) + [8], None)):
                compare(states, layers, MODEL.step(rows, only=only))
            figures = layers[0].gauge.snapshot()
            CASE.assertGreater(figures["most_rounds"], 1)
            CASE.assertEqual(figures["suggested_cap"], -(-8 * groups // world) * world)
            CASE.assertLessEqual(max(each.gauge.snapshot()["peak"] for each in layers), figures["buffer"])


def check_manual_cut() -> None:
    """A manual cut below what can arrive is raised to it, said once, counted; a small batch stays cut."""
    states, layers = build(2, 2, manual=3, **MORI)
    seen: list[int] = []
    for experts in layers:
        experts._tiers = (16, 32)  # as where kernels are tuned for such sizes
        original = experts.run_moe_core
        experts.run_moe_core = lambda batch, rows, original=original: (seen.append(rows), original(batch, rows))[1]
    with CASE.assertLogs(level="WARNING") as logs:
        for rows, expected in (([1, 1], 3), ([5, 4], 9), ([6, 6], 12)):
            seen.clear()
            compare(states, layers, MODEL.step(rows, only=0))
            CASE.assertEqual(set(seen), {expected})
    CASE.assertEqual(sum("is raised to 9" in line for line in logs.output), 2, "once a rank")
    CASE.assertEqual(layers[0].gauge.snapshot()["input_limit_raised"], 2)


def check_padding_stays() -> None:
    """Padding rows reach no other rank, whatever their routing says."""
    states, layers = build(4, 4, **MORI)
    compare(states, layers, MODEL.step([6, 6, 6, 6], [2, 0, 1, 3], only=0))
    received = [experts.gauge.snapshot()["live"] for experts in layers]
    CASE.assertLessEqual(received[0], 2 + 0 + 1 + 3 + 4)
    CASE.assertGreaterEqual(received[0], 2 + 0 + 1 + 3)
    for rank, (rows, real) in enumerate(((6, 2), (6, 0), (6, 1), (6, 3))):
        if rank > 1:  # the experts that all routing names are on ranks 0 and 1
            CASE.assertEqual(received[rank], rows - real)


def check_result_is_new() -> None:
    """What a layer returned stays as it is while the next layer exchanges tokens."""
    states, layers = build(2, 2, **MORI)
    step, other = MODEL.step([4, 4]), MODEL.step([4, 4], seed=1)

    def work(rank: int) -> None:
        first = run_rank(layers[rank], states[rank], step)
        kept = first.clone()
        run_rank(layers[rank], states[rank], other)
        CASE.assertTrue(torch.equal(first, kept))

    run_ranks(work, range(2))


def check_metadata() -> None:
    """A rank whose rows are not what the others were told refuses before it exchanges anything."""
    states, layers = build(2, 2, **MORI)
    step = MODEL.step([4, 3])
    for fb in (None, MODEL.step([5, 3]).batch_of(0), MODEL.step([4]).batch_of(0), MODEL.step([4, 3, 1]).batch_of(0)):
        with CASE.assertRaisesRegex(RuntimeError, "the step's metadata says"):
            layers[0](step.x[0], step.topk[0], fb)


def check_full_buffer_and_gauge() -> None:
    states, layers = build(2, 2, **MORI)
    compare(states, layers, MODEL.step([3, 2]))
    said = describe_experts(layers[0])
    CASE.assertEqual((said["transport"], said["recv_buffer_rows"]), ("portable (routed over torch.distributed, sync)", 32))
    figures = said["received_rows"]
    CASE.assertTrue(0 < figures["live"] == figures["peak"] <= figures["bound"] == 5 and figures["buffer"] == 32)
    CASE.assertEqual(layers[0].gauge.snapshot()["live"], 0, "nothing since the last look")
    for experts in layers:
        experts._full_buffer = True
    compare(states, layers, MODEL.step([3, 2]))
    CASE.assertEqual(layers[0].gauge.snapshot()["bound"], 32)


def check_device_only_exchange() -> None:
    """The way of GPUs, where every rank picks its rows on the device."""
    for args, cap in ((MORI, 0), (LOW, 0), (MORI, 6)):
        states, layers = build(4, 4, limit=8, cap=cap, **args)
        for experts in layers:
            experts.dispatcher.transport._gathered = True
        for rows, real in (([5, 3, 8, 1], None), ([0, 7, 0, 0], None), ([6, 6, 6, 6], [2, 6, 0, 5])):
            compare(states, layers, MODEL.step(rows, real, seed=3))


CHECKS = {
    "loads": check_loads,
    "low latency": lambda: check_loads(LOW),
    "gathered": lambda: check_loads(GATHERED),
    "gathered, width split": lambda: check_loads(GATHERED, ep=1),
    "one rank": check_one_rank,
    "capped": check_capped,
    "manual cut": check_manual_cut,
    "padding": check_padding_stays,
    "new result": check_result_is_new,
    "metadata": check_metadata,
    "gauge": check_full_buffer_and_gauge,
    "device": check_device_only_exchange,
}
