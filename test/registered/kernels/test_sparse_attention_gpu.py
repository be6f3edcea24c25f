"""Sparse attention on a GPU against float64 over decoded rows, and captured; sibling of test_sparse_attention.py."""

import unittest
from unittest import mock

import torch

from sglang.kernels.ops.attention import sparse_passes
from sglang.kernels.ops.attention.packed_rows import store_rows_torch
from sglang.kernels.ops.attention.sparse_attention import PACKED_ARCHS, sparse_attention, sparse_attention_triton
from sglang.kernels.ops.attention.sparse_splits import PASSES
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.srt.platforms import current_platform
from sglang.test.cache_pools import make_pages
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.sparse_cases import DIM, ROPE, assert_near, sparse_inputs, sparse_matrix
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=150, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=150, suite="stage-b-test-1-gpu-small-amd-mi35x")

DEVICE = "cuda"
OF_SM90 = sorted({passes for _, passes in PASSES["sm_90"]}, key=str)


def on_gpu(args):
    return tuple(arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args)


def pages_on_gpu(args, per_page):
    """The caches in pages of one buffer each, as in a pool: copies on the device have no gaps."""
    moved = list(on_gpu(args))
    for at in (1, 6):
        if at < len(args) and args[at] is not None and args[at].dim() == 3:
            cache, scales = args[at], args[5 if at == 1 else 7]
            pages = make_pages(cache.shape[0], cache.shape[1], DIM, ROPE, cache.dtype, DEVICE)
            pages[0].view(torch.uint8).copy_(cache.view(torch.uint8))
            pages[1].copy_(scales)
            moved[at], moved[5 if at == 1 else 7] = pages
    return tuple(moved)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestSparseAttentionOnGpu(CustomTestCase):
    def test_matrix(self):
        count = 0
        for case in sparse_matrix((1, 16, 64, 128), fp8_dtype(current_platform.arch)):
            args, truth = pages_on_gpu(case.args, 0), case.truth()
            self.assertTrue(sparse_attention.impls[0].accepts(*args), case.name)
            for splits in (None, 1, 2, 4, 8):
                with self.subTest(case.name, splits=splits):
                    found = sparse_attention_triton(*args, splits=splits)
                    self.assertFalse(bool(found[0].any()), "a row that sees nothing")
                    assert_near(found, truth)
                    count += 1
        print(f"{count} (case, splits) pairs on {torch.cuda.get_device_name()}")

    def test_two_passes(self):
        """All cases of 8-bit rows, with the instructions of the architecture if it has them, and without."""
        dtype, of_arch = fp8_dtype(current_platform.arch), current_platform.arch in PACKED_ARCHS
        for case in sparse_matrix((1, 16, 64, 128), dtype):
            args, truth = pages_on_gpu(case.args, 0), case.truth()
            args += (None,) * (12 - len(args)) + (1,) * (len(args) < 13)
            if args[5] is None:
                continue
            self.assertTrue(sparse_passes.fits_passes(args[0], args[1], args[5], args[6]), case.name)
            for passes in OF_SM90:
                for packed in {of_arch, False}:
                    with self.subTest(case.name, passes=passes, packed=packed):
                        found = sparse_passes.attend_in_passes(*args, passes=passes, packed=packed)
                        self.assertFalse(bool(found[0].any()), "a row that sees nothing")
                        assert_near(found, truth)
                        with mock.patch.object(sparse_passes, "MAX_BETWEEN", 100_000):
                            parts = sparse_passes.attend_in_passes(*args, passes=passes, packed=packed)
                        self.assertTrue(torch.equal(found, parts))

    def test_two_captured_passes_give_the_same_bits(self):
        lengths = tuple(range(0, 130, 2))
        args = pages_on_gpu(sparse_inputs(64, 64, fp8_dtype(current_platform.arch), lengths=lengths).args, 0)
        eager = sparse_attention_triton(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = sparse_attention_triton(*args)
        graph.replay()
        self.assertTrue(torch.equal(eager, captured))

    def test_a_captured_call_gives_the_same_bits(self):
        for splits in (1, 4):
            args = pages_on_gpu(sparse_inputs(64, 64, fp8_dtype(current_platform.arch)).args, 0)
            eager = sparse_attention_triton(*args, splits=splits)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = sparse_attention_triton(*args, splits=splits)
            graph.replay()
            self.assertTrue(torch.equal(eager, captured))

    def test_pages_past_two_gib(self):
        """The address of a row is of 64 bits: page 16,000 of 256 rows of 584 bytes."""
        dtype = fp8_dtype(current_platform.arch)
        big = make_pages(16_000, 256, DIM, ROPE, dtype, DEVICE)
        rows = torch.randn(300, DIM, device=DEVICE).bfloat16()
        ids = torch.arange(16_000 * 256 - 300, 16_000 * 256, device=DEVICE)
        store_rows_torch(rows, ids, *big)
        few = make_pages(2, 256, DIM, ROPE, dtype, DEVICE)
        store_rows_torch(rows, torch.arange(300, device=DEVICE), *few)
        q = torch.randn(2, 16, DIM, device=DEVICE).bfloat16()
        sinks, places = torch.zeros(16, device=DEVICE), torch.arange(128, device=DEVICE).expand(2, -1).contiguous()
        found = sparse_attention_triton(q, big[0], (places + ids[0]).int(), sinks, 0.04, big[1])
        self.assertTrue(torch.equal(found, sparse_attention_triton(q, few[0], places.int(), sinks, 0.04, few[1])))


if __name__ == "__main__":
    unittest.main()
