"""Fused mHC on a GPU: served widths, and graphs alternating with an eager stream over poisoned scratch.

Its CPU siblings: test_triton_interpreted.py for the kernels, test_aiter_fused_mhc.py for the graphs.
"""

import unittest
from unittest import mock

import torch

from sglang.kernels.ops.mhc import hc_head, hc_post_pre, hc_pre
from sglang.kernels.ops.mhc.launchers import Parts, make_parts
from sglang.test.aiter_mhc_cases import crossing
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=90, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=90, suite="stage-b-test-1-gpu-small-amd-mi35x")

DEVICE = "cuda"
# Largest errors relative to the largest value, of streams, row, post and comb. A sum between two bfloat16 numbers may
# be rounded to either: streams are rounded once, a row before its norm and after it.
UNIT = torch.finfo(torch.bfloat16).eps
BOUNDS = {torch.bfloat16: (UNIT, 2 * UNIT, 1e-3, 1e-3), torch.float32: (1e-5, 1e-4, 1e-4, 1e-4)}


def poisoned(*args):
    return Parts(*(part.fill_(torch.nan) for part in make_parts(*args)))


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestFusedCrossing(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.backends.cuda.matmul.allow_tf32 = False

    def assert_near(self, found, wanted, name):
        for part, of_reference, bound in zip(found, wanted, BOUNDS[found[0].dtype]):
            self.assertEqual((part.dtype, part.shape), (of_reference.dtype, of_reference.shape), name)
            if part.numel():
                error = (part.float() - of_reference.float()).abs().max() / of_reference.float().abs().max()
                self.assertLessEqual(float(error), bound, name)

    def test_served_widths(self):
        """Against the torch reference on the same GPU, in bfloat16 and float32."""
        for width in (64, 320, 2880, 4096, 7168, 8192):
            for rows in (0, 1, 15, 16, 17, 64, 65, 257, 1025):
                for dtype in (torch.bfloat16, torch.float32):
                    args = crossing(rows, width, DEVICE, dtype)
                    found = hc_post_pre.hc_post_pre_triton(*args)
                    self.assert_near(found[:4], hc_post_pre.hc_post_pre_torch(*args)[:4], f"{rows} x {width} {dtype}")
                    self.assertTrue(found[4])

    def test_way_in_and_head(self):
        for width in (320, 4096):
            for rows in (1, 33, 700):
                _, x, _, _, fn, base, scale, *_ = crossing(rows, width, DEVICE)
                for streams in (x, x[:, :1].expand(-1, 4, -1)):
                    args = (streams, fn, base, scale, 1e-6, 1e-6, 20)
                    found, wanted = hc_pre.hc_pre_triton(*args), hc_pre.hc_pre_torch(*args)
                    self.assert_near((found[0], found[0], *found[1:]), (wanted[0], wanted[0], *wanted[1:]), rows)
                    args = (streams, fn[:4].contiguous(), base[:4].contiguous(), scale[:1].contiguous(), 1e-6, 1e-6)
                    self.assert_near([hc_head.hc_head_triton(*args)], [hc_head.hc_head_torch(*args)], rows)

    def test_rows_do_not_change_each_other(self):
        """A row is the same bits in any batch of up to 64."""
        args = crossing(64, 4096, DEVICE)
        whole = hc_post_pre.hc_post_pre_triton(*args)
        for rows in (1, 16, 17, 63):
            some = hc_post_pre.hc_post_pre_triton(*(arg[:rows].contiguous() for arg in args[:4]), *args[4:])
            for part, of_whole in zip(some[:4], whole[:4], strict=True):
                self.assertTrue(torch.equal(part, of_whole[:rows]), rows)

    def test_graphs_and_an_eager_stream_in_turns(self):
        """Two graphs replayed on one stream while another runs eagerly: each as if it were alone."""
        op, sizes = hc_post_pre.hc_post_pre_triton, (8, 16)
        given = {rows: crossing(rows, 4096, DEVICE, seed=rows) for rows in sizes}
        op(*given[8]), op(*given[16]), op(*crossing(5, 4096, DEVICE))
        torch.cuda.synchronize()
        pool, graphs, outputs = torch.cuda.graph_pool_handle(), {}, {}
        main, side = torch.cuda.Stream(), torch.cuda.Stream()
        with mock.patch.object(hc_post_pre, "make_parts", poisoned):
            for rows in sizes:
                graphs[rows] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[rows], pool=pool):
                    outputs[rows] = op(*given[rows])
            for turn in range(50):
                eager_args = crossing(5, 4096, DEVICE, seed=turn)
                for rows in sizes:
                    for kept, fresh in zip(given[rows][:4], crossing(rows, 4096, DEVICE, seed=99 * turn + rows)[:4]):
                        kept.copy_(fresh)
                torch.cuda.synchronize()
                found = {}
                with torch.cuda.stream(main):
                    graphs[8].replay()
                    found[8] = [part.clone() for part in outputs[8][:4]]
                    graphs[16].replay()
                    found[16] = [part.clone() for part in outputs[16][:4]]
                with torch.cuda.stream(side):
                    found[5] = op(*eager_args)[:4]
                torch.cuda.synchronize()
                for rows, args in ((8, given[8]), (16, given[16]), (5, eager_args)):
                    for part, alone in zip(found[rows], op(*args)[:4], strict=True):
                        self.assertTrue(torch.equal(part, alone), f"turn {turn}, {rows} rows")


if __name__ == "__main__":
    unittest.main()
