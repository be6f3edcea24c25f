"""The MORI fake against a brute-force account of who sends what to whom, and what it refuses."""

from __future__ import annotations

import dataclasses
import unittest
import unittest.mock
from typing import Any

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()

import mori  # noqa: E402
import mori.ops  # noqa: E402
import mori.shmem  # noqa: E402
from mori.errors import VendorWouldCorrupt  # noqa: E402

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

HIDDEN, TOP_K, PER_RANK, MAX_TOKENS = 16, 3, 4, 6
INT32_MAX = 2**31 - 1
Kernel = mori.ops.EpDispatchCombineKernelType


def config(rank: int, world: int, **changes: Any) -> mori.ops.EpDispatchCombineConfig:
    values: dict[str, Any] = dict(
        data_type=torch.float32,
        rank=rank,
        world_size=world,
        hidden_dim=HIDDEN,
        scale_dim=2,
        scale_type_size=4,
        max_token_type_size=4,
        max_num_inp_token_per_rank=MAX_TOKENS,
        num_experts_per_rank=PER_RANK,
        num_experts_per_token=TOP_K,
        gpu_per_node=world,
    )
    return mori.ops.EpDispatchCombineConfig(**{**values, **changes})


def batch(rank: int, world: int, seed: int, tokens: int | None = None, with_holes: bool = False) -> dict[str, Any]:
    """What ``rank`` dispatches: every rank can compute everybody's."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    count = (rank * 2 + seed) % (MAX_TOKENS + 1) if tokens is None else tokens
    scores = torch.rand(count, world * PER_RANK, generator=generator)
    ids = scores.topk(TOP_K, dim=1).indices.to(torch.int32)
    if with_holes and count:
        ids[0] = -1
        ids[:, 1] = -1
    return {
        "input": torch.randn(count, HIDDEN, generator=generator),
        "weights": torch.rand(count, TOP_K, generator=generator),
        "scales": torch.rand(count, 2, generator=generator),
        "indices": ids,
    }


def destinations(ids: list[int]) -> set[int]:
    return {expert // PER_RANK for expert in ids if expert >= 0}


def init_shmem(rank: int) -> None:
    torch._C._distributed_c10d._register_process_group("mori", torch.distributed.group.WORLD)
    assert mori.shmem.shmem_torch_process_group_init("mori") == 0
    assert mori.shmem.shmem_mype() == rank


def round_trip(op: Any, rank: int, world: int, seed: int, two_phase: bool, with_holes: bool = False) -> None:
    """One dispatch and combine, every received row and every sum against the account."""
    case = unittest.TestCase()
    everyone = [batch(source, world, seed, with_holes=with_holes) for source in range(world)]
    mine = everyone[rank]
    outputs = op.dispatch_send(**mine) if two_phase else op.dispatch(**mine, call_local_expert_count=True)
    out, weights, scales, ids, total = outputs
    if two_phase:
        assert out.isnan().all() and int(total) == 0, "rows may not be read before dispatch_recv"
        op.dispatch_recv(call_local_expert_count=True)
    rows = int(total)
    source_tokens = [op.decode_send_flat_idx(flat) for flat in op.get_dispatch_src_token_pos().tolist()]
    expected = {
        (source, token)
        for source, theirs in enumerate(everyone)
        for token, chosen in enumerate(theirs["indices"].tolist())
        if rank in destinations(chosen)
    }
    case.assertEqual((rows, set(source_tokens)), (len(expected), expected))
    for row, (source, token) in enumerate(source_tokens):
        theirs = everyone[source]
        assert torch.equal(out[row], theirs["input"][token])
        assert torch.equal(ids[row], theirs["indices"][token])
        assert torch.equal(weights[row], theirs["weights"][token])
        assert torch.equal(scales[row], theirs["scales"][token])
    assert out[rows:].isnan().all() and weights[rows:].isnan().all() and (ids[rows:] == INT32_MAX).all()
    if two_phase:
        case.assertEqual([s for s, _ in source_tokens], sorted(s for s, _ in source_tokens))
    counts = torch.bincount(ids[:rows][ids[:rows] // PER_RANK == rank] - rank * PER_RANK, minlength=PER_RANK)
    case.assertEqual(op.local_expert_count.tolist(), counts.tolist())

    worked = torch.full_like(out, torch.nan)
    worked[:rows] = out[:rows] * (rank + 1)
    if two_phase:
        summed, _ = op.combine_send(worked, None, mine["indices"])
        assert summed.isnan().all(), "sums may not be read before combine_recv"
        op.combine_recv()
        case.assertEqual(int(total), rows)
    else:
        summed, _ = op.combine(worked, None, mine["indices"])
        case.assertEqual(int(total), 0)
    case.assertEqual(summed.shape, (MAX_TOKENS, HIDDEN))
    for token, chosen in enumerate(mine["indices"].tolist()):
        factor = sum(target + 1 for target in destinations(chosen))
        torch.testing.assert_close(summed[token], mine["input"][token] * factor)
    assert summed[len(mine["indices"]) :].isnan().all()


class TestRoundTrip(CustomTestCase):
    def test_sync_and_two_phase(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            for kernel in (Kernel.IntraNode, Kernel.AsyncLL):
                op = mori.ops.EpDispatchCombineOp(config(rank, 3, kernel_type=kernel, gpu_per_node=1))
                for seed in range(4):
                    round_trip(op, rank, 3, seed, kernel is Kernel.AsyncLL)
                round_trip(op, rank, 3, 5, kernel is Kernel.AsyncLL, with_holes=kernel is Kernel.IntraNode)

        run_processes(3, work)

    def test_outputs_are_the_same_views_each_call(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            op = mori.ops.EpDispatchCombineOp(config(rank, 1))
            seen = []
            for seed in (3, 4):
                mine = batch(rank, 1, seed)
                outputs = op.dispatch(**mine)
                summed, _ = op.combine(outputs[0], None, mine["indices"])
                seen.append([x.data_ptr() for x in (*outputs, summed)])
            assert seen[0] == seen[1]

        run_processes(1, work)

    def test_wire_types(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float4_e2m1fn_x2):
                op = mori.ops.EpDispatchCombineOp(config(rank, 2))
                mine = batch(rank, 2, 3)
                bits = (mine["input"] * 9).to(torch.uint8)
                out, *_, total = op.dispatch(bits.view(dtype), mine["weights"], None, mine["indices"])
                assert out.dtype == dtype
                rows = int(total)
                stale = out[rows:]
                assert dtype == torch.float4_e2m1fn_x2 or stale.float().isnan().all()
                op.combine(torch.zeros(rows, HIDDEN), None, mine["indices"])
            for quant, tolerance in (("fp8_direct_cast", 0.07), ("fp8_blockwise", 0.07), ("none", 0.01)):
                op = mori.ops.EpDispatchCombineOp(config(rank, 2, quant_type=quant))
                for tokens in (None, 0):
                    mine = batch(rank, 2, 3, tokens)
                    out, *_, total = op.dispatch(mine["input"].bfloat16(), mine["weights"], None, mine["indices"])
                    summed, _ = op.combine(out[: int(total)], None, mine["indices"])
                    for token, chosen in enumerate(mine["indices"].tolist()):
                        expected = mine["input"][token] * len(destinations(chosen))
                        assert (summed[token].float() - expected).abs().max() <= tolerance * expected.abs().max()

        with_groups = unittest.mock.patch.dict("os.environ", MORI_FP8_COMBINE_SCALE_DIM="4")
        with with_groups:
            run_processes(2, work)


class TestRefusals(CustomTestCase):
    """Every rank raises, whichever rank is at fault, and before a row has moved."""

    def test_receive_cap(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            op = mori.ops.EpDispatchCombineOp(config(rank, 2, max_total_recv_tokens=3))
            assert op.max_num_tokens_to_recv() == 4, "the cap is rounded up to a multiple of the ranks"
            too_many = batch(rank, 2, 1, tokens=3)
            too_many["indices"] = torch.tensor([[0, 1, 0]] * 3, dtype=torch.int32)  # six rows for rank 0
            self.assertRaisesRegex(VendorWouldCorrupt, "rank 0 would receive 6 rows", op.dispatch, **too_many)
            round_trip_fits = batch(rank, 2, 1, tokens=2)
            round_trip_fits["indices"] = torch.full((2, TOP_K), rank * PER_RANK, dtype=torch.int32)
            assert int(op.dispatch(**round_trip_fits)[-1]) == 2
            clamped = mori.ops.EpDispatchCombineOp(config(rank, 2, max_total_recv_tokens=10**6))
            assert clamped.max_num_tokens_to_recv() == 2 * MAX_TOKENS

        run_processes(2, work)

    def test_combine_addresses(self) -> None:
        """IntraNode writes back at rank * limit + token of its source's buffer, which a receive cap shortens."""

        def work(rank: int) -> None:
            init_shmem(rank)
            # A buffer of 8 rows for 2 ranks of 6: rank 1 writes token t at row 6 + t.
            capped = config(rank, 2, max_total_recv_tokens=8)
            for kernel in (Kernel.IntraNode, Kernel.IntraNodeLL, Kernel.AsyncLL):
                for tokens, target, fits in ((4, 0, True), (2, 1, True), (3, 1, kernel is Kernel.AsyncLL)):
                    op = mori.ops.EpDispatchCombineOp(dataclasses.replace(capped, kernel_type=kernel))
                    mine = batch(rank, 2, 1, tokens=tokens if rank == 0 else 0)
                    mine["indices"].fill_(target * PER_RANK)
                    out, *_, total = op.dispatch(**mine)
                    if kernel is Kernel.AsyncLL:
                        op.dispatch_recv()
                    self.assertEqual(int(total), tokens if rank == target else 0)
                    if fits:
                        summed, _ = op.combine(out.clone(), None, mine["indices"])
                        if kernel is Kernel.AsyncLL:
                            op.combine_recv()
                        assert torch.equal(summed[: len(mine["input"])], mine["input"])
                    else:
                        said = r"row 8 \(.*\) of 8 is written" if rank == 0 else "rank 0 made a call"
                        with self.assertRaisesRegex(VendorWouldCorrupt, said):
                            op.combine(out, None, mine["indices"])
            # From the registered buffer each rank reads its own received rows, wherever they came from.
            op = mori.ops.EpDispatchCombineOp(dataclasses.replace(capped, use_external_inp_buf=False))
            mine = batch(rank, 2, 1, tokens=3 if rank == 0 else 0)
            mine["indices"].fill_(PER_RANK)
            out, *_, total = op.dispatch(**mine)
            registered = op.get_registered_combine_input_buffer(torch.float32)
            registered[: int(total)] = out[: int(total)]
            summed, _ = op.combine(registered, None, mine["indices"])
            assert torch.equal(summed[: len(mine["input"])], mine["input"])

        run_processes(2, work)

    def test_one_rank_at_fault_stops_all(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            op = mori.ops.EpDispatchCombineOp(config(rank, 2))
            low_latency = mori.ops.EpDispatchCombineOp(config(rank, 2, kernel_type=Kernel.AsyncLL))
            good = batch(rank, 2, 1, tokens=3)
            faults: list[tuple[Any, dict[str, Any]]] = [
                (op, batch(rank, 2, 1, tokens=MAX_TOKENS + 1)),
                (op, {**good, "indices": good["indices"].long()}),
                (op, {**good, "indices": good["indices"][:2]}),
                (op, {**good, "weights": good["weights"].double()}),
                (op, {**good, "input": good["input"].half()}),
                (op, {**good, "input": good["input"].t().contiguous().t()}),
                (op, {**good, "scales": good["scales"].half()}),
                (low_latency, {**good, "indices": good["indices"].index_fill(1, torch.tensor([1]), -1)}),
                (low_latency, {**good, "weights": None}),
            ]
            for number, (target, bad) in enumerate(faults):
                with self.assertRaises(VendorWouldCorrupt, msg=f"fault {number}"):
                    target.dispatch(**(bad if rank == 1 else good))
            with self.assertRaisesRegex(VendorWouldCorrupt, "without a received dispatch"):
                op.combine(good["input"], None, good["indices"])
            out, *_, total = op.dispatch(**good)
            with self.assertRaises(VendorWouldCorrupt):
                op.dispatch(**good)
            with self.assertRaises(ValueError if rank == 1 else VendorWouldCorrupt):
                op.combine(out, None, good["indices"][: 3 - rank])
            with self.assertRaises(VendorWouldCorrupt):
                op.combine(out, None, good["indices"].flip(0) if rank == 1 else good["indices"])
            with self.assertRaises(VendorWouldCorrupt):
                op.combine(out[: int(total) - rank], None, good["indices"])
            op.combine(out, None, good["indices"])

        run_processes(2, work)

    def test_phases(self) -> None:
        def work(rank: int) -> None:
            init_shmem(rank)
            sync = mori.ops.EpDispatchCombineOp(config(rank, 1))
            op = mori.ops.EpDispatchCombineOp(config(rank, 1, kernel_type=Kernel.AsyncLL))
            good = batch(rank, 1, 1, tokens=3)
            self.assertRaises(AssertionError, op.dispatch_recv)
            sync.dispatch(**good)
            self.assertRaises(ValueError, sync.dispatch_recv)
            out, *_ = op.dispatch_send(**good)
            self.assertRaisesRegex(VendorWouldCorrupt, "sent", op.dispatch_send, **good)
            self.assertRaisesRegex(VendorWouldCorrupt, "sent", op.combine, out, None, good["indices"])
            op.dispatch_recv()
            self.assertRaises(VendorWouldCorrupt, op.dispatch_recv)
            op.combine_send(out, None, good["indices"])
            self.assertRaisesRegex(VendorWouldCorrupt, "combine sent", op.dispatch_send, **good)
            op.combine_recv()
            self.assertRaises(VendorWouldCorrupt, op.combine_recv)

        run_processes(1, work)

    def test_constructor(self) -> None:
        def work(rank: int) -> None:
            self.assertRaises(RuntimeError, mori.ops.EpDispatchCombineOp, config(rank, 1))
            init_shmem(rank)
            for changes in (
                {"quant_type": "fp9"},
                {"quant_type": "fp4_blockwise"},
                {"gpu_per_node": 3},
                {"num_experts_per_token": 64},
            ):
                with self.assertRaises(ValueError, msg=str(changes)):
                    mori.ops.EpDispatchCombineOp(config(rank, 1, **changes))
            with self.assertRaises(VendorWouldCorrupt):
                mori.ops.EpDispatchCombineOp(config(rank, 2))

        run_processes(1, work)


class TestVersions(CustomTestCase):
    def test_old_config_has_no_receive_cap(self) -> None:
        names = {field.name for field in dataclasses.fields(mori.ops.EpDispatchCombineConfig)}
        with mori.fake_version("1.0.0"):
            self.assertEqual(mori.__version__, "1.0.0")
            old = {field.name for field in dataclasses.fields(mori.ops.EpDispatchCombineConfig)}
            self.assertRaises(TypeError, config, 0, 1, max_total_recv_tokens=4)
            config(0, 1)
        self.assertEqual(names - old, {"max_total_recv_tokens"})
        self.assertEqual(config(0, 1, max_total_recv_tokens=4).max_total_recv_tokens, 4)


if __name__ == "__main__":
    unittest.main()
