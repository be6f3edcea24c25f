"""What every transport promises, compared with an account token by token: portable ones and MORI's fake, over gloo."""

from __future__ import annotations

import unittest
from dataclasses import replace

import torch

from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.layers.moe.token_dispatcher.base import DispatchError, EpConfig, ExchangeConfigError, SendBatch
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_plan import (
    ASYNC_LL,
    INTER_NODE,
    INTER_NODE_LL,
    INTRA_NODE,
    choose_kernel,
)
from sglang.srt.layers.moe.token_dispatcher.moriep import MoriTransport
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

LIMIT, HIDDEN, TOP_K, PER_RANK = 5, 8, 3, 4
CASE = unittest.TestCase()
FAKE_KERNELS = (INTRA_NODE, INTER_NODE, INTER_NODE_LL, ASYNC_LL)


def world_handle(rank: int) -> ProcessGroupHandle:
    group = torch.distributed.group.WORLD
    return ProcessGroupHandle(rank, torch.distributed.get_world_size(), group, group)


def sizes(rank: int, **changes) -> EpConfig:
    config = EpConfig(
        rank=rank, world_size=torch.distributed.get_world_size(), hidden_dim=HIDDEN, max_num_inp_token_per_rank=LIMIT,
        num_experts_per_rank=PER_RANK, num_experts_per_token=TOP_K, data_type=torch.float32, combine_type=torch.float32,
    )  # fmt: skip
    return replace(config, **changes)


def portable(gathered: bool, two_phase: bool):
    def make(rank, **changes):
        return PortableTransport(sizes(rank, two_phase=two_phase, **changes), world_handle(rank), "cpu", gathered)

    return make


def mori(kernel):
    def make(rank, **changes):
        return MoriTransport(sizes(rank, two_phase=kernel.is_two_phase, **changes), kernel, world_handle(rank))

    return make


PORTABLE = {f"{way}-{mode}": portable(way == "gathered", mode == "two_phase")
            for way in ("routed", "gathered") for mode in ("sync", "two_phase")}  # fmt: skip
MORI = {kernel.name: mori(kernel) for kernel in FAKE_KERNELS}
TRANSPORTS = {**PORTABLE, **MORI}


class Tokens:
    """What each rank dispatches in one step: every rank can compute everybody's."""

    def __init__(self, world: int, counts: list[int], seed: int, dtype=torch.float32, negative: bool = False) -> None:
        self.counts = counts
        generator = torch.Generator().manual_seed(seed)
        experts = world * PER_RANK
        self.x = [torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in counts]
        self.weights = [torch.rand(n, TOP_K, generator=generator) for n in counts]
        self.ids = [torch.rand(n, experts, generator=generator).topk(TOP_K).indices.int() for n in counts]
        self.scales = [torch.rand(n, 2, generator=generator) for n in counts]
        if negative:
            for ids in self.ids:
                ids[:1] = -1
                ids[1:2, 0] = experts + 7

    def destinations(self, source: int, token: int) -> list[int]:
        world = len(self.counts)
        return sorted({e // PER_RANK for e in self.ids[source][token].tolist() if 0 <= e < world * PER_RANK})

    def arriving(self, rank: int) -> list[tuple[int, int]]:
        return [(source, token) for source, n in enumerate(self.counts) for token in range(n)
                if rank in self.destinations(source, token)]  # fmt: skip


def poison(batch) -> None:
    batch.hidden.view(torch.uint8).fill_(255)
    batch.weights.fill_(torch.nan)
    batch.indices.fill_(2**31 - 1)


def row_bytes(row: torch.Tensor) -> bytes:
    return bytes(row.contiguous().view(torch.uint8).tolist())


def round_trip(transport, tokens: Tokens, rank: int, with_scales: bool = False) -> None:
    """One dispatch and combine; every received row and every sum against the account."""
    two_phase = transport.config.two_phase
    scales = tokens.scales[rank] if with_scales else None
    mine = SendBatch(tokens.x[rank], tokens.weights[rank], scales, tokens.ids[rank], tokens.counts)
    batch = transport.dispatch_send(mine)
    if isinstance(transport, PortableTransport):
        poison(batch)
        CASE.assertRaisesRegex(DispatchError, "not received", transport.dispatch_send, mine)
    transport.dispatch_recv()
    expected = tokens.arriving(rank)
    rows = int(batch.total_recv)
    CASE.assertEqual((batch.total_recv.shape, batch.total_recv.dtype), (torch.Size([1]), torch.int32))
    sources = {row_bytes(x): (source, i) for source, rows_x in enumerate(tokens.x) for i, x in enumerate(rows_x)}
    positions = [sources[row_bytes(row)] for row in batch.hidden[:rows]]
    CASE.assertEqual(sorted(positions), expected, "each token once on each of its ranks")
    if isinstance(transport, PortableTransport):
        CASE.assertEqual(positions, expected, "rank-major, ascending")
    for row, (source, token) in enumerate(positions):
        assert torch.equal(batch.hidden[row], tokens.x[source][token])
        assert torch.equal(batch.weights[row], tokens.weights[source][token])
        assert torch.equal(batch.indices[row], tokens.ids[source][token]), "ids stay global, all K of them"
        assert batch.scales is None or torch.equal(batch.scales[row], tokens.scales[source][token])
    CASE.assertEqual(batch.scales is None, not with_scales)
    # Rows past the count are garbage, and may be so on the way back.
    y = torch.full((max(sum(tokens.counts), 1), HIDDEN), torch.nan)
    y[:rows] = batch.hidden[:rows].float() * (rank + 1)
    out = transport.combine_send(y, tokens.ids[rank])
    transport.combine_recv()
    if not two_phase:
        CASE.assertEqual(int(batch.total_recv), 0, "zeroed by combine")
    CASE.assertEqual(tuple(out.shape), (LIMIT, HIDDEN))
    for token in range(tokens.counts[rank]):
        factor = sum(target + 1 for target in tokens.destinations(rank, token))
        torch.testing.assert_close(out[token], tokens.x[rank][token].float() * factor)


def dispatch(transport, *mine):
    batch = transport.dispatch_send(SendBatch(*mine))
    transport.dispatch_recv()
    return batch


def combine(transport, y, ids):
    out = transport.combine_send(y, ids)
    transport.combine_recv()
    return out


def in_world(world: int, work) -> None:
    """``work(rank)`` on each of ``world`` processes under the HIP policy over fakes."""

    def child(rank: int) -> None:
        with override_platform(RocmOverFakesPlatform(("mori",))):
            work(rank)

    run_processes(world, child)


class TestContract(CustomTestCase):
    def test_round_trips(self):
        def work(rank):
            world = torch.distributed.get_world_size()
            loads = [[LIMIT] * world, [0] * world, [LIMIT, *[0] * (world - 1)], [r % 3 for r in range(world)]]
            for name, make in TRANSPORTS.items():
                transport = make(rank)
                for seed, counts in enumerate(loads):
                    round_trip(transport, Tokens(world, counts, seed), rank)
                scaled = make(rank, scale_dim=2)
                round_trip(scaled, Tokens(world, loads[0], 9), rank, with_scales=True)
                if name in PORTABLE:
                    round_trip(transport, Tokens(world, loads[0], 5, negative=True), rank)
                    eight = make(rank, data_type=torch.float8_e4m3fn)
                    round_trip(eight, Tokens(world, loads[0], 6, torch.float8_e4m3fn), rank)

        for world in (1, 2, 4):
            in_world(world, work)

    def test_buffers_are_the_same_storage_each_call(self):
        def work(rank):
            for make in TRANSPORTS.values():
                transport, seen = make(rank), set()
                for seed in range(3):
                    tokens = Tokens(2, [2, 3], seed)
                    mine = (tokens.x[rank], tokens.weights[rank], None, tokens.ids[rank], [2, 3])
                    batch = dispatch(transport, *mine)
                    out = combine(transport, batch.hidden.clone(), tokens.ids[rank])
                    views = (batch.hidden, batch.weights, batch.indices, batch.total_recv, out)
                    seen.add(tuple(view.data_ptr() for view in views))
                    CASE.assertEqual(batch.hidden.shape[0], transport.config.max_recv)
                CASE.assertEqual(len(seen), 1)

        in_world(2, work)

    def test_misuse_is_refused(self):
        def work(rank):
            tokens = Tokens(2, [2, 2], 0)
            mine = (tokens.x[rank], tokens.weights[rank], None, tokens.ids[rank], [2, 2])
            many = Tokens(2, [LIMIT + 1] * 2, 0)
            for make in TRANSPORTS.values():
                transport = make(rank)
                over = (many.x[rank], many.weights[rank], None, many.ids[rank], many.counts)
                send = transport.dispatch_send
                CASE.assertRaisesRegex(ValueError, "the limit is 5", send, SendBatch(*over))
                CASE.assertRaisesRegex(ValueError, "expected torch.float32", send, SendBatch(mine[0].half(), *mine[1:]))
                CASE.assertRaises(ValueError, send, SendBatch(*mine[:3], mine[3].long(), [2, 2]))
                batch = dispatch(transport, *mine)
                CASE.assertRaisesRegex(ValueError, "rows", transport.combine_send, batch.hidden, mine[3][:1])
                combine(transport, batch.hidden.clone(), mine[3])

        in_world(2, work)

    def test_overflow_is_raised_by_every_rank_before_rows_move(self):
        def work(rank):
            tokens = Tokens(2, [4, 4], 0)
            for ids in tokens.ids:
                ids.fill_(PER_RANK)  # all to rank 1
            mine = (tokens.x[rank], tokens.weights[rank], None, tokens.ids[rank])
            for name in (*PORTABLE, "AsyncLL"):
                transport = TRANSPORTS[name](rank, max_total_recv_tokens=5)
                CASE.assertEqual(transport.config.max_recv, 6)
                with CASE.assertRaises(DispatchError):
                    transport.dispatch_send(SendBatch(*mine, [4, 4]))
            routed = PORTABLE["routed-sync"](rank, max_total_recv_tokens=5)
            with CASE.assertRaisesRegex(DispatchError, "rank 1 would receive 8 rows into a buffer of 6"):
                routed.dispatch_send(SendBatch(*mine))
            # What is refused leaves the transport usable.
            fewer = (mine[0][:3], mine[1][:3], None, mine[3][:3], [3, 3])
            batch = dispatch(routed, *fewer)
            CASE.assertEqual(int(batch.total_recv), 6 * rank)

        in_world(2, work)


class TestMoriSettings(CustomTestCase):
    def test_kernel_by_mode_and_size(self):
        for world, low, sdma, limit, expected in (
            (1, False, False, 4096, INTRA_NODE), (8, False, False, 4096, INTRA_NODE),
            (8, True, False, 4096, ASYNC_LL), (2, False, True, 4096, ASYNC_LL),
            (16, False, False, 257, INTER_NODE), (16, False, False, 256, INTER_NODE_LL),
            (64, True, False, 64, ASYNC_LL),
        ):  # fmt: skip
            config = MoriConfig(world, limit, low_latency=low, copy_engines=sdma)
            self.assertIs(choose_kernel(config), expected)

    def test_an_old_release_cannot_be_capped(self):
        import mori as fake

        def work(rank):
            with fake.fake_version("1.0.0"):
                MORI["AsyncLL"](rank)
                with CASE.assertRaisesRegex(ExchangeConfigError, "lacks max_total_recv_tokens=5.*Install MORI 1.1.0"):
                    MORI["AsyncLL"](rank, max_total_recv_tokens=5)

        in_world(2, work)

    def test_mixed_releases_are_refused_on_every_rank(self):
        import mori as fake

        def work(rank):
            with fake.fake_version(f"1.{rank + 1}.0"):
                with CASE.assertRaisesRegex(ExchangeConfigError, r"ranks \[1\] run another MORI"):
                    MORI["AsyncLL"](rank)

        in_world(2, work)


if __name__ == "__main__":
    unittest.main()
