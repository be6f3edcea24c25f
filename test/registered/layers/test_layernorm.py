"""Norms whose weight is float32 next to rows of 16 bits."""

import unittest

import torch

from sglang.kernels.ops.norm.rmsnorm import rms_norm
from sglang.srt.layers.layernorm import Float32RMSNorm
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestFloat32Weights(CustomTestCase):
    def test_the_weight_is_multiplied_before_the_one_rounding(self):
        for case in rms_norm.cases():
            x, weight, eps = case.args
            x = x.bfloat16()
            wide = x.double()
            wanted = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
            norm = Float32RMSNorm(weight.shape[0], eps)
            self.assertEqual(norm.weight.dtype, torch.float32)
            norm.weight.data.copy_(weight)
            found = norm(x)
            self.assertEqual(found.dtype, torch.bfloat16)
            torch.testing.assert_close(found.double(), wanted, rtol=2**-8 * 1.01, atol=1e-6)

    def test_kernels_take_it_and_no_other(self):
        """Their numbers: test_triton_interpreted.py, in float16."""
        x, weight = torch.randn(3, 16).bfloat16(), torch.randn(16)
        for impl in rms_norm.impls[:-1]:
            self.assertTrue(impl.accepts(x, weight.bfloat16(), 1e-6))
            self.assertTrue(impl.accepts(x, weight, 1e-6))
            self.assertFalse(impl.accepts(x, weight.half(), 1e-6))
            self.assertFalse(impl.accepts(x, weight.double(), 1e-6))


if __name__ == "__main__":
    unittest.main()
