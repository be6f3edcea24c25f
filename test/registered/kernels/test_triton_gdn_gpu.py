"""Gated-delta-net steps on the GPU at serving widths: values, padding, replay; their CPU sibling is test_gdn_ops.py."""

import unittest

import torch

from sglang.kernels.ops.gdn.chunk import chunk_table
from sglang.kernels.ops.gdn.decode_step import gdn_decode_step_torch, gdn_decode_step_triton
from sglang.kernels.ops.gdn.extend_step import gdn_extend_step_torch, gdn_extend_step_triton
from sglang.kernels.ops.gdn.verify_step import gdn_verify_step_torch, gdn_verify_step_triton
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.op_cases.gdn import step_inputs
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd-mi35x")

# key heads, value heads a key head, K, V, W
SHAPES = ((2, 2, 128, 128, 4), (1, 1, 128, 128, 4), (1, 4, 128, 128, 4), (2, 3, 32, 48, 4))
LENGTHS = (1, 2, 3, 63, 64, 65, 200)
FLOAT32_ALWAYS = (5, 9)  # A_log and the states


def inputs(rows, slots, shape, dtype, seed=0):
    """Arguments up to the states on the GPU, activations in ``dtype``."""
    made = step_inputs(rows, slots, shape, torch.Generator().manual_seed(seed))
    return [x.cuda() if i in FLOAT32_ALWAYS else x.to(dtype).cuda() for i, x in enumerate(made)]


def clone(args):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in args]


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU; test_gdn_ops and test_triton_interpreted run on the CPU")
class TestTritonGDNOnGpu(CustomTestCase):
    def check(self, triton, reference, args, limits):
        """Outputs and states against the reference on the same numbers, in float32 inside."""
        found, expected = clone(args), wide(args)
        expected[8], expected[9] = args[8].clone(), args[9].clone()
        out, wanted = triton(*found), reference(*expected)
        self.assertTrue(bool(out.isfinite().all()))
        self.assertLess(distance(out, wanted), limits[0])
        self.assertTrue(torch.equal(found[8], expected[8]), "columns")
        self.assertLess(distance(found[9], expected[9]), limits[1])

    def test_values_at_serving_widths(self):
        limits = {torch.float32: (2e-5, 2e-5), torch.float16: (3e-3, 1e-3), torch.bfloat16: (1e-2, 4e-3)}
        for dtype, most in limits.items():
            for shape in SHAPES[: 1 if dtype == torch.float16 else None]:
                with self.subTest(dtype=dtype, shape=shape):
                    slots = torch.tensor([5, 2, 7], device="cuda")
                    args = [*inputs(3, 9, shape, dtype), slots, 1e-6]
                    self.check(gdn_decode_step_triton, gdn_decode_step_torch, args, most)
                    slots = torch.tensor([5, 2, 7, 1, 3, 8, 4], device="cuda")
                    table = [part.cuda() for part in chunk_table(LENGTHS)]
                    args = [*inputs(sum(LENGTHS), 9, shape, dtype, 1), slots, *table, 1e-6]
                    self.check(gdn_extend_step_triton, gdn_extend_step_torch, args, most)

    def test_verify_steps_at_serving_widths(self):
        """Accepted and rejected rows, one sequence, and padding with NaN."""
        limits = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 4e-3)}
        for dtype, most in limits.items():
            for shape, slots, rows in ((SHAPES[0], [5, 2, 7], 4), (SHAPES[2], [3], 2), (SHAPES[3], [1, 0, 6], 9)):
                with self.subTest(dtype=dtype, shape=shape, rows=rows):
                    args = inputs(len(slots) * rows, 9, shape, dtype)
                    old = inputs(9 * rows, 1, shape, dtype, 1)
                    tail_qkv, tail_gates = old[0].view(9, rows, -1), torch.cat(old[2:4], -1).view(9, rows, -1)
                    tail_len = torch.arange(9, device="cuda") * 7 % (rows + 1)
                    # As where start-up poisons the pools.
                    tail_len[7] = 1 << 40
                    tail_qkv[4:5], tail_gates[0] = float("nan"), float("nan")
                    slot_ids = torch.tensor(slots, device="cuda")
                    rest = [tail_qkv, tail_gates, tail_len, slot_ids, 1e-6]
                    found, expected = clone([*args, *rest]), wide([*args, *rest])
                    expected[8], expected[9] = args[8].clone(), args[9].clone()
                    real = (slot_ids > 0).repeat_interleave(rows)
                    out, wanted = gdn_verify_step_triton(*found)[real], gdn_verify_step_torch(*expected)[real]
                    self.assertLess(distance(out, wanted), most[0])
                    self.assertTrue(torch.equal(found[8][1:], expected[8][1:]), "columns")
                    self.assertLess(distance(found[9][1:], expected[9][1:]), most[1])
                    for tail, with_steps in ((found[10], expected[10]), (found[11], expected[11])):
                        torch.testing.assert_close(tail[1:].double(), with_steps[1:], rtol=0, atol=0, equal_nan=True)

    def test_strong_decay_does_not_blur_what_follows(self):
        args = inputs(130, 3, SHAPES[3], torch.float32)
        # Hundreds of nats on every third token, a thousandth on the others.
        strong = torch.arange(130, device="cuda")[:, None] % 3 == 0
        args[3] = torch.where(strong, 700.0, -6.907).expand(-1, args[5].shape[0]).contiguous()
        args[5], args[6] = torch.zeros_like(args[5]), torch.zeros_like(args[6])
        table = [part.cuda() for part in chunk_table([130])]
        rest = [torch.tensor([2], device="cuda"), *table, 1e-6]
        self.check(gdn_extend_step_triton, gdn_extend_step_torch, [*args, *rest], (2e-5, 2e-5))

    def test_padding_rows_are_zero_and_touch_nothing(self):
        args = inputs(4, 6, SHAPES[0], torch.bfloat16)
        slots = torch.tensor([3, 0, 5, 0], device="cuda")
        alone, padded = clone(args), clone(args)
        for x in padded[:4]:
            x[slots == 0] = float("nan")
        out = gdn_decode_step_triton(*padded, slots, 1e-6)
        real = [x[[0, 2]] for x in alone[:4]]
        expected = gdn_decode_step_triton(*real, *alone[4:], slots[[0, 2]], 1e-6)
        self.assertTrue(torch.equal(out[[0, 2]], expected))
        self.assertEqual(int(out[[1, 3]].count_nonzero()), 0)
        self.assertTrue(torch.equal(padded[8], alone[8]) and torch.equal(padded[9], alone[9]))

    def test_a_step_after_a_prefix_equals_one_pass(self):
        shape, total = SHAPES[0], 131
        args = inputs(total, 3, shape, torch.float32)
        slot, whole, cut = torch.tensor([1], device="cuda"), clone(args), clone(args)
        table = [part.cuda() for part in chunk_table([total])]
        expected = gdn_extend_step_triton(*whole, slot, *table, 1e-6)
        table = [part.cuda() for part in chunk_table([total - 1])]
        first = [*(x[:-1] for x in cut[:4]), *cut[4:]]
        parts = [gdn_extend_step_triton(*first, slot, *table, 1e-6)]
        parts.append(gdn_decode_step_triton(*(x[-1:] for x in cut[:4]), *cut[4:], slot, 1e-6))
        self.assertLess(distance(torch.cat(parts), expected), 2e-5)
        self.assertLess(distance(cut[9], whole[9]), 2e-5)

    def test_replay_follows_the_slots_and_repeats_bit_for_bit(self):
        args = inputs(8, 12, SHAPES[0], torch.bfloat16)
        slots = torch.arange(1, 9, device="cuda")
        graph_args, eager_args, stream = clone(args), clone(args), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            gdn_decode_step_triton(*clone(args), slots, 1e-6)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = gdn_decode_step_triton(*graph_args, slots, 1e-6)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for now in ([3, 11, 4, 1, 9, 2, 0, 0], [11, 3, 7, 0, 0, 0, 0, 0]):
                    slots.copy_(torch.tensor(now).pin_memory(), non_blocking=True)
                    graph.replay()
                    expected = gdn_decode_step_triton(*eager_args, slots, 1e-6)
                    same = (out == expected).all() & (graph_args[9] == eager_args[9]).all()
                    same &= (graph_args[8] == eager_args[8]).all()
                    torch.cuda.set_sync_debug_mode("default")
                    self.assertTrue(bool(same))
                    torch.cuda.set_sync_debug_mode("error")
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_extend_repeats_bit_for_bit(self):
        args = inputs(sum(LENGTHS), 9, SHAPES[0], torch.bfloat16)
        slots, table = torch.arange(1, 8, device="cuda"), [part.cuda() for part in chunk_table(LENGTHS)]
        first, second = clone(args), clone(args)
        outs = [gdn_extend_step_triton(*some, slots, *table, 1e-6) for some in (first, second)]
        self.assertTrue(torch.equal(*outs) and torch.equal(first[9], second[9]) and torch.equal(first[8], second[8]))


if __name__ == "__main__":
    unittest.main()
