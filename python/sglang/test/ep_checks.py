"""Checks of spread experts that raise if one of their rules is broken; the ranks are threads."""

from __future__ import annotations

import dataclasses
import unittest
from typing import Any

import torch

from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.factory import describe_experts
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.token_dispatcher.base import DispatchError, EpConfig, ExchangeConfigError, SendBatch
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_plan import choose_kernel, plan_exchange
from sglang.srt.layers.moe.token_dispatcher.moriep import (
    MoriEPDispatcher,
    check_mori_compatibility,
)
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.test.ep_world import EIGHT_BIT, FOUR_BIT, MODEL, EpModel, EpStep, check_mori, run_rank, thread_world
from sglang.test.mori_checks import MORI_CHECKS
from sglang.test.process_ranks import run_processes
from sglang.test.thread_ranks import run_ranks

CASE = unittest.TestCase()
MORI: dict[str, Any] = {"moe_a2a_backend": "mori", "deepep_mode": "normal"}
LOW: dict[str, Any] = {**MORI, "deepep_mode": "low_latency"}
GATHERED: dict[str, Any] = {"moe_a2a_backend": "none"}


def poison_what_is_stale(experts: MoriEPMoE) -> None:
    """Fill the receive buffers with poison, which must never be read."""
    transport: Any = experts.dispatcher.transport
    batch = transport._batch
    batch.hidden.copy_(torch.tensor(torch.nan))
    batch.weights.fill_(torch.nan)
    batch.indices.fill_(2**31 - 1)


def build(
    world: int,
    groups: int,
    limit: int = 16,
    cap: int = 0,
    manual: int = 0,
    ep: int | None = None,
    model: EpModel = MODEL,
    **args: Any,
) -> tuple[list[ParallelState], list[Any]]:
    """The ranks of a world and their layers under these settings, receive buffers full of poison."""
    states = thread_world(world, groups, world if ep is None else ep)
    with (
        envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(limit),
        envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap),
        envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS.override(manual),
    ):
        layers = [model.build(state, **args) for state in states]
    for experts in layers:
        if isinstance(experts, MoriEPMoE):
            poison_what_is_stale(experts)
    return states, layers


def compare(states: list[ParallelState], layers: list, step: EpStep, model: EpModel = MODEL) -> None:
    """Every rank's result of ``step`` against all experts in one place."""
    found = run_ranks(lambda rank: run_rank(layers[rank], states[rank], step), range(len(states)))
    for rows, state in zip(found, states):
        torch.testing.assert_close(rows, model.truth(step, state.attn_dp_rank), rtol=1e-5, atol=1e-5)


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
    for world, groups, cap, buffer in ((2, 2, 2, 2), (4, 4, 9, 12), (4, 4, 8, 8), (4, 2, 4, 4), (2, 1, 3, 4)):
        for args in (MORI, LOW):
            states, layers = build(world, groups, limit=8, cap=cap, **args)
            # In two rounds of equal shares the last of these would not fit into 8 rows.
            for rows, only in (([8] * groups, 0), ([0] * (groups - 1) + [8], None), ([7, 7, 1, 1][:groups], 0)):
                compare(states, layers, MODEL.step(rows, only=only))
            figures = layers[0].recv_stats.snapshot()
            CASE.assertGreater(figures["most_rounds"], 1)
            CASE.assertEqual(figures["buffer"], buffer)
            CASE.assertEqual(figures["suggested_cap"], -(-8 * groups // world) * world)
            CASE.assertLessEqual(max(each.recv_stats.snapshot()["peak"] for each in layers), figures["buffer"])


def check_manual_cut() -> None:
    """A manual limit below the rows that can arrive is raised, logged once, counted; a small batch keeps it."""
    states, layers = build(2, 2, manual=3, **MORI)
    seen: list[int] = []
    for experts in layers:
        experts._tiers = (16, 32)  # as where kernels are tuned for such sizes

        def run_moe_core(arrived: Any, original: Any = experts.run_moe_core) -> Any:
            seen.append(arrived.recv_cap)
            return original(arrived)

        experts.run_moe_core = run_moe_core
    with CASE.assertLogs(level="WARNING") as logs:
        for rows, expected in (([1, 1], 3), ([5, 4], 9), ([6, 6], 12)):
            seen.clear()
            compare(states, layers, MODEL.step(rows, only=0))
            CASE.assertEqual(set(seen), {expected})
    CASE.assertEqual(sum("is raised to" in line for line in logs.output), 2, "once per rank")
    CASE.assertEqual(layers[0].recv_stats.snapshot()["input_limit_raised"], 2)


def check_padding_stays() -> None:
    """Padding rows reach no other rank, whatever their routing says."""
    states, layers = build(4, 4, **MORI)
    compare(states, layers, MODEL.step([6, 6, 6, 6], [2, 0, 1, 3], only=0))
    received = [experts.recv_stats.snapshot()["live"] for experts in layers]
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
    """A rank whose row count differs from what the others know refuses before it exchanges anything."""
    states, layers = build(2, 2, **MORI)
    states[0].world.meeting.abort()  # type: ignore[attr-defined]  # no other rank will come
    step = MODEL.step([4, 3])
    for forward_batch in (
        None,
        MODEL.step([5, 3]).batch_of(0),
        MODEL.step([4]).batch_of(0),
        MODEL.step([4, 3, 1]).batch_of(0),
    ):
        with CASE.assertRaisesRegex(RuntimeError, "the step's metadata says"):
            layers[0](step.x[0], step.topk[0], forward_batch)


def check_full_buffer_and_recv_stats() -> None:
    states, layers = build(2, 2, **MORI)
    compare(states, layers, MODEL.step([3, 2]))
    said = describe_experts(layers[0])
    CASE.assertEqual(said["transport"], "portable (routed over torch.distributed, sync)")
    figures = said["received_rows"]
    CASE.assertTrue(0 < figures["live"] == figures["peak"] <= figures["bound"] == 5 and figures["buffer"] == 32)
    CASE.assertEqual(layers[0].recv_stats.snapshot()["live"], 0, "nothing since the last look")
    for experts in layers:
        experts._tiers = (experts.dispatcher.config.max_recv,)
    compare(states, layers, MODEL.step([3, 2]))
    CASE.assertEqual(layers[0].recv_stats.snapshot()["bound"], 32)


def check_stale_rows() -> None:
    """No expert computes a row past those that arrived, also where rows of an earlier step are there."""
    for world in (2, 1):
        states, layers = build(world, world, **MORI)
        seen: list[torch.Tensor] = []
        for experts in layers:
            experts._tiers = (experts.dispatcher.config.max_recv,)
            original = experts.run_experts

            def run_experts(*args: Any, original: Any = original, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(args[2])
                return original(*args)

            experts.run_experts = run_experts  # type: ignore[method-assign]
        for rows in (8, 3):
            seen.clear()
            compare(states, layers, MODEL.step([rows] * world, only=0))
            live = sorted(int((ids >= 0).any(1).sum()) for ids in seen)
            # Routing names experts 0 to 2, all on the first of two ranks.
            CASE.assertEqual(live, [0, 2 * rows] if world == 2 else [rows])


def check_contract() -> None:
    """Cases that a transport refuses before it could lose a row."""
    sizes = EpConfig(0, 1, 8, 4, 8, 3, torch.float32, torch.float32, max_total_recv_tokens=2, two_phase=True)

    def rows(count: int) -> SendBatch:
        ids = torch.zeros(count, 3, dtype=torch.int32)
        return SendBatch(torch.ones(count, 8), torch.ones(count, 3), None, ids, [count])

    for gathered in (False, True):
        transport = PortableTransport(sizes, ProcessGroupHandle(), "cpu", gathered)
        CASE.assertRaises(AssertionError, transport.dispatch_recv)
        CASE.assertRaisesRegex(ValueError, "the limit is 4", transport.dispatch_send, rows(5))
        CASE.assertRaisesRegex(DispatchError, "PREALLOC_MAX_RECV_TOKENS", transport.dispatch_send, rows(3))
        halves = rows(1)._replace(hidden=rows(1).hidden.half())
        CASE.assertRaisesRegex(ValueError, "expected torch.float32", transport.dispatch_send, halves)
        batch = transport.dispatch_send(rows(2))
        CASE.assertRaisesRegex(DispatchError, "not received", transport.dispatch_send, rows(2))
        transport.dispatch_recv()
        send, ids = transport.combine_send, rows(2).indices
        CASE.assertRaisesRegex(ValueError, "1 rows of ids", send, batch.hidden, ids[:1])
        CASE.assertRaisesRegex(DispatchError, "rows to combine", send, batch.hidden[:1], ids)
        CASE.assertRaisesRegex(ValueError, "float32 results", send, batch.hidden.half(), ids)
        out = send(batch.hidden, ids)
        CASE.assertRaisesRegex(DispatchError, "not received", transport.dispatch_send, rows(2))
        transport.combine_recv()
        CASE.assertTrue(torch.equal(out[:2], torch.ones(2, 8)))
    dispatcher = MoriEPDispatcher(transport, torch.device("cpu"))
    CASE.assertRaisesRegex(DispatchError, "dispatch_a comes next", dispatcher.dispatch_b)
    x, weights, _, ids, _ = rows(1)
    dispatcher.dispatch_a(x, TopKOutput(weights, ids), [1])
    CASE.assertRaisesRegex(DispatchError, "dispatch_b comes next", dispatcher.combine_b)


def check_settings() -> None:
    """Settings that a kernel of MORI, the portable transport or the weights cannot serve."""
    refused = (
        (MoriConfig(8, 64, max_recv_tokens=7), "PREALLOC_MAX_RECV_TOKENS=7 is below 8, one row of each rank"),
        (MoriConfig(6, 64), "1, 2, 4 or whole nodes"),
        (MoriConfig(12, 64), "1, 2, 4 or whole nodes"),
        (MoriConfig(128, 64, low_latency=True), "at most 64 ranks"),
        (MoriConfig(16, 64, combine_dtype="fp8"), "COMBINE_DTYPE=fp8 is not supported"),
        (MoriConfig(2, 4, combine_dtype="fp8_direct_cast"), "supports only bfloat16"),
        (MoriConfig(2, 4, dispatch_dtype="fp8"), "DISPATCH_DTYPE=fp8 needs fp8 expert weights"),
        (
            MoriConfig(2, 4, dispatch_dtype="fp4"),
            "DISPATCH_DTYPE=fp4 is not supported: .* in 16 bits to all others, including MXFP4",
        ),
    )
    for config, message in refused:
        with CASE.assertRaisesRegex(ExchangeConfigError, message):
            plan_exchange(config, choose_kernel(config), 0, 128, 16, 2, torch.float32)
    for hidden, groups in ((2048, 56), (7168, 16)):
        needed = f"needs MORI_FP8_COMBINE_SCALE_DIM={hidden // 128}, found {groups}"
        with CASE.assertRaisesRegex(ExchangeConfigError, needed):
            config = MoriConfig(2, 4, combine_dtype="fp8", combine_groups=groups)
            plan_exchange(config, choose_kernel(config), 0, 128, hidden, 2, torch.bfloat16)
    with CASE.assertRaisesRegex(ExchangeConfigError, "float16: add --dtype bfloat16"):
        plan_exchange(MoriConfig(2, 4), choose_kernel(MoriConfig(2, 4)), 0, 8, 16, 2, torch.float16)
    # The portable transport has no such reasons, and knows no codec; the worst case is no cap.
    CASE.assertEqual(
        plan_exchange(MoriConfig(8, 64, max_recv_tokens=100), None, 0, 64, 16, 2, torch.float16).max_recv, 104
    )
    plan = plan_exchange(MoriConfig(1, 4, combine_dtype="fp8"), None, 0, 8, 16, 2, torch.float32)
    CASE.assertEqual(plan.combine_wire, "none")
    choose_kernel(MoriConfig(8, 64, max_recv_tokens=100, low_latency=True))
    for cap, limit in ((8, 1), (100, 12), (512, 64)):
        config = MoriConfig(8, 64, max_recv_tokens=cap)
        plan = plan_exchange(config, choose_kernel(config), 0, 64, 16, 2, torch.float32)
        CASE.assertEqual((plan.max_num_inp_token_per_rank, plan.max_total_recv_tokens), (limit, 0))
    with CASE.assertRaisesRegex(ExchangeConfigError, "combine by source needs 512 rows"):
        dataclasses.replace(plan, max_total_recv_tokens=100)
    for cap in (-1, 17, 10**9):
        with CASE.assertRaisesRegex(ExchangeConfigError, "PREALLOC_MAX_RECV_TOKENS=.* must be 0"):
            MoriConfig(4, 4, max_recv_tokens=cap)
    three = thread_world(3, 1, 3)[0]
    with CASE.assertRaisesRegex(ValueError, "8 experts cannot be split over 3"):
        MODEL.build(three, **MORI)
    check_release()


def check_release() -> None:
    """Fields that a release of MORI lacks are left out only where that changes nothing."""

    class Old:
        def __init__(self, rank: int, num_qp_per_pe: int = 1) -> None:
            pass

    class Older:
        def __init__(self, rank: int) -> None:
            pass

    harmless = {"rank": 0, "num_qp_per_pe": 2, "max_total_recv_tokens": 0, "quant_type": "none"}
    for release, kept in ((Old, {"rank": 0, "num_qp_per_pe": 2}), (Older, {"rank": 0})):
        kwargs = dict(harmless)
        with CASE.assertLogs(level="WARNING") as logs:
            check_mori_compatibility(kwargs, release)
        CASE.assertEqual(kwargs, kept)
        for name in harmless.keys() - kept.keys():
            CASE.assertIn(name, logs.output[0])
    for name, value in (
        ("max_total_recv_tokens", 64), ("quant_type", "fp8_blockwise"), ("kernel_type", 4), ("gpu_per_node", 8),
        ("use_external_inp_buf", False), ("rdma_block_num", 32), ("unheard_of", 0),
    ):  # fmt: skip
        with CASE.assertRaisesRegex(ExchangeConfigError, f"lacks {name}={value!r}"):
            check_mori_compatibility({**harmless, name: value}, Old)


def check_eight_bit() -> None:
    """Rows sent as 8-bit floats give, bit by bit, the result of rows quantised on the experts' rank."""
    step = EIGHT_BIT.step([5, 3], only=1)
    results = []
    for dtype, travels in (("bf16", "float32"), ("fp8", "float8_e4m3fn"), ("auto", "float8_e4m3fn")):
        with envs.SGLANG_MORI_DISPATCH_DTYPE.override(dtype):
            states, layers = build(2, 2, model=EIGHT_BIT, **MORI)
        CASE.assertEqual(describe_experts(layers[0])["dispatch_dtype"], travels)
        results.append(run_ranks(lambda rank: run_rank(layers[rank], states[rank], step), range(2)))  # noqa: B023
    for rank, rows in enumerate(results[0]):
        torch.testing.assert_close(rows, EIGHT_BIT.truth(step, rank), rtol=1e-4, atol=1e-4)
        CASE.assertTrue(torch.equal(rows, results[1][rank]) and torch.equal(rows, results[2][rank]))


def check_four_bit() -> None:
    """Experts in MXFP4 take rows as they are, whole buffers or cut ones."""
    for args, cap in ((MORI, 0), (LOW, 0), (MORI, 6), (GATHERED, 0)):
        states, layers = build(4, 4, model=FOUR_BIT, limit=8, cap=cap, **args)
        if args is not GATHERED:
            CASE.assertEqual(describe_experts(layers[0])["dispatch_dtype"], "float32")
        for rows, real in (([5, 3, 8, 1], None), ([0, 7, 0, 0], None), ([6, 6, 6, 6], [2, 6, 0, 5])):
            compare(states, layers, FOUR_BIT.step(rows, real, seed=3), FOUR_BIT)
    with envs.SGLANG_MORI_DISPATCH_DTYPE.override("fp8"):
        with CASE.assertRaisesRegex(ExchangeConfigError, "needs fp8 expert weights"):
            build(2, 2, model=FOUR_BIT, **MORI)


def check_fake() -> None:
    """MORI's own transport over its fake, two processes."""
    run_processes(2, lambda rank: check_mori(rank, 2, fake=True))


def check_device_only_exchange() -> None:
    """The path of GPUs, where every rank selects its rows on the device."""
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
    "recv_stats": check_full_buffer_and_recv_stats,
    "device": check_device_only_exchange,
    "stale": check_stale_rows,
    "contract": check_contract,
    "settings": check_settings,
    "8-bit": check_eight_bit,
    "4-bit": check_four_bit,
    "fake": check_fake,
    **MORI_CHECKS,
}
