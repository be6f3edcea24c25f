"""The Triton form of the draw at served sizes: the reference's ids, whatever the rows look like, and one replay."""

import math
import unittest

import torch

from sglang.kernels.ops.sampling.draw import draw_torch, draw_triton
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.draw_truth import judge_draw
from sglang.test.op_cases.sampling import RowOf, draw_args
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=60, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=60, suite="stage-b-test-1-gpu-small-amd-mi35x")

VOCABULARIES = (32_000, 129_280, 151_643, 248_320, 256_000)
ROWS = [
    RowOf(), RowOf(top_p=0.9), RowOf(top_k=50), RowOf(0.7, 50, 0.9, 0.05), RowOf(top_p=0.5), RowOf(top_p=0.999),
    RowOf(1.5, min_p=0.1), RowOf(greedy=True), RowOf(top_k=1), RowOf(top_p=1e-6), RowOf(top_p=0.0),
    RowOf(2.0, 40_000), RowOf(top_k=20_000, top_p=0.9), RowOf(0.01, top_p=0.9), RowOf(100.0, top_p=0.9),
]  # fmt: skip


def shapes(vocab, generator):
    """Logits [15, V] of one kind each."""
    flat = torch.randn(len(ROWS), vocab, generator=generator, device="cuda")
    yield "normal", flat
    yield "wide", flat * 6
    peaked = flat.clone()
    peaked[:, 77], peaked[:, 78:90] = 25.0, 20.0
    yield "peaked", peaked
    yield "one chunk", torch.where(torch.arange(vocab, device="cuda") < 3000, flat + 12.0, flat)
    yield "falling", flat + 30.0 / (1.0 + torch.arange(vocab, device="cuda") / 50.0)
    yield "few levels", (flat * 2).round() / 2
    yield "all equal", torch.zeros_like(flat)
    holes = torch.where(torch.rand(flat.shape, generator=generator, device="cuda") < 0.999, -math.inf, flat)
    yield "holes", holes
    yield "huge", flat * 1e6


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestDrawOnGpu(CustomTestCase):
    def test_rows_of_every_kind(self):
        near = drawn = 0
        for vocab in VOCABULARIES:
            generator = torch.Generator("cuda").manual_seed(vocab)
            for name, logits in shapes(vocab, generator):
                for seed in range(3):
                    with self.subTest(vocab=vocab, shape=name, seed=seed):
                        args = draw_args(logits, ROWS, seed)
                        ids, faults = draw_triton(*args)
                        near += judge_draw(args, ids, faults, torch.zeros_like(faults))
                        drawn += len(ids)
        print(f"{near} of {drawn} ids lie within 1e-6 of a boundary and differ")
        self.assertLess(near, 0.1 * drawn)

    def test_reference_on_the_gpu(self):
        logits = torch.randn(len(ROWS), 50_001, device="cuda")
        args = draw_args(logits, ROWS)
        judge_draw(args, *draw_torch(*args), torch.zeros(len(ROWS), dtype=torch.int64, device="cuda"))

    def test_a_row_draws_alike_alone_and_among_others_and_in_a_graph(self):
        logits = torch.randn(len(ROWS), 129_280, device="cuda") * 2
        args = draw_args(logits, ROWS, 5)
        together, _ = draw_triton(*args)
        for row in range(len(ROWS)):
            alone = [arg[row : row + 1].contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.assertEqual(int(draw_triton(*alone)[0]), int(together[row]), ROWS[row])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed, _ = draw_triton(*args)
            for _ in range(3):
                graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        self.assertEqual(replayed.tolist(), together.tolist())

    def test_faults(self):
        logits = torch.randn(6, 129_280, device="cuda")
        logits[1, 100_000], logits[2], logits[3, 5] = math.nan, -math.inf, math.inf
        allowed = torch.full((6, 4040), -1, dtype=torch.int32, device="cuda")
        allowed[4] = 0
        for row in (RowOf(), RowOf(top_p=0.9), RowOf(greedy=True)):
            ids, faults = draw_triton(*draw_args(logits, row, allowed=allowed))
            self.assertEqual(faults.tolist(), [0, 1, 1, 1, 2, 0])
            self.assertTrue(bool(((ids >= 0) & (ids < 129_280)).all()))


if __name__ == "__main__":
    unittest.main()
