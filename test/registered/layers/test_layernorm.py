"""Norms whose weight is float32 next to rows of 16 bits, and outputs of norms in addition to their rows."""

import unittest
from types import SimpleNamespace

import torch

from sglang.kernels.ops.moe.router_logits import router_logits
from sglang.kernels.ops.norm.add_norm_logits import FEW_NUMBERS
from sglang.kernels.ops.norm.rmsnorm import rms_norm
from sglang.kernels.ops.quant.group_fp8 import quantize_groups_torch
from sglang.srt.layers.layernorm import Float32RMSNorm, GemmaRMSNorm, RMSNorm, RoutedRows
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import ProjectedRows
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestFloat32Weights(CustomTestCase):
    def test_the_weight_is_multiplied_before_the_one_rounding(self):
        for x, weight, eps in (case.args for case in cases_of(rms_norm) if len(case.args) == 3):
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
        """Which form is chosen; test_triton_interpreted.py checks the numbers, in float16."""
        x, weight = torch.randn(3, 16).bfloat16(), torch.randn(16)
        for impl in rms_norm.impls[:-1]:
            self.assertTrue(impl.accepts(x, weight.bfloat16(), 1e-6))
            self.assertTrue(impl.accepts(x, weight, 1e-6))
            self.assertFalse(impl.accepts(x, weight.half(), 1e-6))
            self.assertFalse(impl.accepts(x, weight.double(), 1e-6))


class TestRows(CustomTestCase):
    """Outputs of a norm in addition to its rows, for the next layer."""

    def test_few_rows_come_with_their_logits(self):
        generator = torch.Generator().manual_seed(0)
        router = SimpleNamespace(router_weight=torch.randn(5, 64, generator=generator), logits_dtype=torch.float32)
        for kind in (RMSNorm, GemmaRMSNorm):
            norm, apart = kind(64), kind(64)
            gain = torch.rand(64, generator=generator)
            norm.weight.data.copy_(gain)
            apart.weight.data.copy_(gain)
            norm.route_for(router)
            most = FEW_NUMBERS // 64
            for count in (1, 3, most):
                x, residual = (torch.randn(count, 64, generator=generator) for _ in range(2))
                found, total = norm(x, residual)
                normed, wanted_total = apart(x, residual)
                self.assertIsInstance(found, RoutedRows)
                self.assertTrue(torch.equal(found.rows, normed) and torch.equal(total, wanted_total))
                self.assertTrue(torch.equal(found.logits, router_logits(normed, router.router_weight)))
                self.assertTrue(torch.equal(norm(x), apart(x)), "nothing was added: another layer comes next")
            for count in (0, most + 1):
                x = torch.randn(count, 64, generator=generator)
                self.assertTrue(torch.equal(norm(x, x)[0], apart(x, x)[0]))

    def test_one_row_comes_multiplied(self):
        generator = torch.Generator().manual_seed(3)
        for kind in (RMSNorm, GemmaRMSNorm):
            norm, apart, linear = kind(64), kind(64), ReplicatedLinear(64, 7)
            for module in (norm, apart):
                module.weight.data.copy_(torch.rand(64, generator=torch.Generator().manual_seed(4)))
            linear.weight.data.copy_(torch.randn(7, 64, generator=generator))
            norm.project_for(linear)
            x, residual = torch.randn(2, 1, 64, generator=generator)
            wanted, wanted_total = apart(x, residual)
            found, total = norm(x, residual)
            alone = norm(x)
            for rows, normed in ((found, wanted), (alone, apart(x))):
                self.assertIsInstance(rows, ProjectedRows)
                self.assertTrue(torch.equal(rows.rows, normed))
                self.assertTrue(torch.equal(linear(rows), linear(normed)))
            self.assertTrue(torch.equal(total, wanted_total))
            for count in (0, 2):
                x = torch.randn(count, 64, generator=generator)
                self.assertTrue(torch.equal(norm(x, x)[0], apart(x, x)[0]))

    def test_a_product_that_is_not_all_of_a_layer_is_left_to_it(self):
        norm, linear = RMSNorm(64), ReplicatedLinear(64, 7, bias=True)
        norm.weight.data.fill_(1.0)
        norm.project_for(linear)
        self.assertIsInstance(norm(torch.randn(1, 64)), torch.Tensor)

    def test_rows_come_quantised_for_a_product_of_such(self):
        x, residual = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
        norm, router = RMSNorm(256), SimpleNamespace(router_weight=torch.ones(2, 256), logits_dtype=torch.float32)
        norm.weight.data.copy_(torch.rand(256, generator=torch.Generator().manual_seed(2)))  # it is not initialised
        normed, total = norm(x, residual)
        q, scale = quantize_groups_torch(normed, torch.float8_e4m3fn)
        norm.quantize_for(SimpleNamespace(row_dtype=torch.float8_e4m3fn))
        plain, (alone, its_total) = norm(total), norm(x, residual)
        norm.route_for(router)
        routed, again = norm(x, residual)
        self.assertTrue(torch.equal(its_total, total) and torch.equal(again, total))
        for rows in (plain, alone, routed.rows):
            self.assertTrue(torch.equal(rows.plain, normed) and torch.equal(rows.scale, scale))
            self.assertTrue(torch.equal(rows.q.float(), q.float()) and rows.dtype == x.dtype and rows.shape == q.shape)


if __name__ == "__main__":
    unittest.main()
