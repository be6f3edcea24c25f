"""Every Triton body on the CPU, in Triton's interpreter: each op's cases against its reference and the truth.

The interpreter runs what the source says, in float32 here: it shows wrong indices, masks and orders of operations,
and nothing of what a compiler or a GPU makes of them.
"""

import itertools
import math
import os
import sys
import unittest
from collections import Counter
from unittest import mock

import numpy
import torch
import triton
from test_op_parity import QUANTIZING, check_case, tensors
from triton.runtime import interpreter

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul_torch
from sglang.kernels.ops.attention.packed_rows import load_rows
from sglang.kernels.ops.attention.prepare_compressed import prepare_compressed_triton
from sglang.kernels.ops.linear.dense import dense_linear_row
from sglang.kernels.ops.mhc import launchers
from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre
from sglang.kernels.ops.mhc.hc_pre import hc_pre_torch, hc_pre_triton
from sglang.kernels.ops.moe import fused_experts_fp8
from sglang.kernels.ops.moe.fused_experts import Scaled, expert_product, order_pairs
from sglang.kernels.ops.norm.norm_product import norm_product_row, norm_product_torch
from sglang.kernels.ops.norm.rmsnorm import fits_triton, rms_norm_torch, rms_norm_triton
from sglang.kernels.ops.quant import group_fp8
from sglang.kernels.registry import REGISTRY
from sglang.test.aiter_mhc_cases import crossing
from sglang.test.cache_pools import make_pages
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.op_cases.quant import random_blocks
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=90, suite="stage-b-test-cpu")

# The interpreter rounds to 8 bits wrongly where the mantissa carries into the exponent (127.9 becomes 64): these bodies
# are interpreted in float16 (test_rows_quantised_where_they_are_made), and left to the GPU in 8 bits, as are writes to
# 8-bit caches; the products of 8-bit rows are given rows that torch quantised.
NOT_INTERPRETED = ("quant.quantize_groups", *QUANTIZING)
ROW_WRITERS = ("kv_cache", "prepare", "compressed")
# Six seconds and more each; another case of many blocks of the same op is interpreted, and a GPU runs these.
SLOW = ("many-blocks-2x2", "many-blocks-tail-3x3", "many-blocks-fp8")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@unittest.skipIf(VERSION < (3, 8), "Triton's interpreter before 3.8 does not loop over run-time bounds with numpy 2.4")
class TestTritonInterpreted(CustomTestCase):
    def test_every_triton_body_on_every_case(self):
        REGISTRY.load_all()
        for module in (group_fp8, fused_experts_fp8):
            self.enterContext(mock.patch.object(module, "quantize_groups_triton", group_fp8.quantize_groups_torch))
        ran: Counter[str] = Counter()
        for name, op in sorted(REGISTRY.ops.items()):
            for impl in (impl for impl in op.impls if impl.name == "triton" and name not in NOT_INTERPRETED):
                ran[name] = 0
                for case in cases_of(op):
                    if case.name in SLOW or (op.group in ROW_WRITERS and case.name.endswith("-fp8")):
                        continue
                    if impl.accepts is None or impl.accepts(*case.args):
                        with self.subTest(op=name, case=case.name):
                            check_case(op, impl, case)
                            ran[name] += 1
        self.assertEqual([name for name, count in ran.items() if not count], [], "their Triton body accepts no case")
        self.assertGreater(ran.total(), 200)
        print(f"{ran.total()} (op, case) pairs in the interpreter of triton {triton.__version__}")

    def test_rows_quantised_where_they_are_made(self):
        """In float16, which the interpreter rounds correctly: codes, scales, and where both are written."""
        REGISTRY.load_all()
        for name in NOT_INTERPRETED:
            op = REGISTRY.ops[name]
            (triton_body,) = (impl for impl in op.impls if impl.name == "triton")
            for case in cases_of(op):
                args = [torch.float16 if arg is torch.float8_e4m3fn else arg for arg in case.args]
                with self.subTest(op=name, case=case.name):
                    self.assertTrue(triton_body.accepts(*case.args))
                    for found, wanted in zip(*map(tensors, (triton_body.fn(*args), op.reference(*args))), strict=True):
                        self.assertEqual(found.dtype, wanted.dtype)
                        rtol = 2**-10 if found.dtype == torch.float16 else 1e-4
                        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5, equal_nan=True)

    def test_tiles_of_two_sums_and_rows_quantised_by_the_product(self):
        """8-bit experts with many tokens, float16 in place of the 8-bit type; also a width of an odd number of runs."""
        generator = torch.Generator().manual_seed(3)
        gate_up_tile = {"BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 2}
        ids = torch.tensor([[0, 2], [2, -1], [1, 2], [2, 0], [2, 2]], dtype=torch.int32)
        pairs = (ids.flatten() >= 0).nonzero().flatten()
        order = order_pairs(ids, 3, 4)
        self.assertEqual(order.num_blocks.tolist(), [4, 0])
        for hidden in (256, 384):
            w13, w13_scale, w2, w2_scale = (
                torch.stack(part)
                for rows, columns in ((512, hidden), (hidden, 256))
                for part in zip(*(random_blocks(rows, columns, generator) for _ in range(3)), strict=True)
            )
            rows = Scaled(*group_fp8.quantize_groups_torch(torch.randn(5, hidden, generator=generator), torch.float16))
            stacked = Scaled(w13.half(), w13_scale), Scaled(w2.half(), w2_scale)
            activated = expert_product(rows, stacked[0], ids, order, gate_up_tile, 4, True, torch.float32)
            down_tile = gate_up_tile | {"TWO": True}
            product = expert_product(activated, stacked[1], ids, order, down_tile, 4, False, torch.float32)
            for pair in pairs.tolist():
                token, expert = pair // 2, ids.flatten()[pair]
                of_token = rows.data[token : token + 1], rows.scale[token : token + 1]
                gate_up = group_fp8.scaled_product(*of_token, w13[expert].half(), w13_scale[expert])
                q, scale = group_fp8.quantize_groups_torch(silu_and_mul_torch(gate_up), torch.float16)
                torch.testing.assert_close(activated.data[pair], q[0], rtol=2**-9, atol=1e-3)
                torch.testing.assert_close(activated.scale[pair], scale[0], rtol=1e-5, atol=0)
                wanted = group_fp8.scaled_product(q, scale, w2[expert].half(), w2_scale[expert])
                torch.testing.assert_close(product.data[pair], wanted[0], rtol=2e-3, atol=2e-3)

    def test_minus_zero_never_becomes_the_nan_of_fnuz(self):
        """Under a conversion that keeps the sign of what rounds to zero, as one for OCP's format does."""
        convert = interpreter._convert_float
        num_nans = 0

        def keep_sign(data, source, target, rounding):
            nonlocal num_nans
            bits = convert(data, source, target, rounding)
            nans = (bits == 0) & numpy.signbit(data) & (target == triton.language.float8e4b8)
            num_nans += nans.sum()
            return numpy.where(nans, numpy.uint8(0x80), bits)

        self.enterContext(mock.patch.object(interpreter, "_convert_float", keep_sign))
        rows = torch.full((2, 512), -0.0)
        rows[1, ::2], rows[1, 1::2] = 1.0, -1e-9
        for tail, dim in ((64, 512), (None, 128)):
            cache = make_pages(1, 2, dim, tail, torch.float8_e4m3fnuz)
            num_nans = 0
            q, places, unturned = torch.zeros(2, 1, dim), torch.arange(2), torch.tensor([[1.0] * 32 + [0.0] * 32] * 2)
            prepare_compressed_triton(
                q, rows[:, :dim].contiguous(), places, unturned, torch.ones(dim), 1e-6, places, *cache
            )
            self.assertGreaterEqual(num_nans, dim - (tail or 0))
            self.assertFalse(bool((cache[0].view(torch.uint8)[..., : dim - (tail or 0)] == 0x80).any()))
            self.assertAlmostEqual(float(load_rows(*cache, places, dim)[1, 0]), 2**0.5, delta=0.05)

    def test_partial_sums_of_mhc_are_written_before_they_are_read(self):
        """NaN in scratch and outputs beforehand changes no result, with one block of rows and with several."""
        real = torch.empty
        poison = mock.patch.object(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
        # Of 1,024 columns there are 16 slices, of which the second kernel adds eight at once.
        for rows, width, reading_back, at_once in (
            (1, 1024, False, False), (17, 320, False, False), (33, 128, True, False), (17, 128, True, True),
        ):  # fmt: skip
            args = crossing(rows, width, "cpu", torch.float32)
            (triton_body,) = (impl for impl in hc_post_pre.impls if impl.name == "triton")
            with (
                poison,
                mock.patch.object(launchers, "STORES_SEEN_BEHIND_BARRIERS", ("cpu",) if reading_back else ()),
                mock.patch.object(launchers, "AT_ONCE_DTYPES", (torch.float32,) if at_once else ()),
            ):
                found = triton_body.fn(*args)[:4]
                way_in = hc_pre_triton(args[1], *args[4:10])
            wanted = *hc_post_pre.reference(*args)[:4], *hc_pre_torch(args[1], *args[4:10])
            for part, of_reference in zip((*found, *way_in), wanted, strict=True):
                torch.testing.assert_close(part, of_reference, rtol=1e-4, atol=1e-5)

    def test_few_rows_of_eight_bits_in_every_form(self):
        """The forms that this machine's table does not choose, with groups that the columns do not fill."""
        generator = torch.Generator().manual_seed(2)
        for _, _, tile in group_fp8.FEW_ROWS_TILES:
            for rows, columns in ((1, 128), (3, 2176), (16, 2048)):
                w, w_scale = random_blocks(136, columns, generator)
                x = torch.randn(rows, columns, generator=generator)
                q, scale = group_fp8.quantize_groups_torch(x, w.dtype)
                with self.subTest(tile=tile, rows=rows, columns=columns):
                    found = group_fp8.block_product(q, scale, w, w_scale, torch.float32, tile)
                    wanted = group_fp8.scaled_product(q, scale, w, w_scale)
                    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_one_row_of_a_dense_product(self):
        generator = torch.Generator().manual_seed(3)
        for width, columns in ((1, 8), (33, 1100), (64, 2048)):
            x = torch.randn(1, columns + 3, generator=generator).half()[:, :columns]
            w = (torch.randn(width, columns, generator=generator) / columns**0.5).half()
            found, wanted = dense_linear_row(x, w), (x.double() @ w.double().t())
            torch.testing.assert_close(found.double(), wanted, rtol=2**-10, atol=1e-3)

    def test_one_row_is_normed_by_who_multiplies_it(self):
        """Also outputs, and columns, that end before the program's numbers do."""
        generator = torch.Generator().manual_seed(4)
        for dim, width in ((128, 3), (384, 130), (1152, 200), (129, 5), (4096, 6)):
            x, residual = torch.randn(2, 1, dim, generator=generator).half()
            w = (torch.randn(width, dim, generator=generator) / dim**0.5).half()
            gain = torch.rand(dim, generator=generator) + 0.5
            for offset, added, weight in itertools.product((False, True), (residual, None), (gain, gain.half())):
                with self.subTest(dim=dim, offset=offset, alone=added is None):
                    args = (x, added, weight, 1e-6, w, offset)
                    found, wanted = norm_product_row(*args), norm_product_torch(*args)
                    self.assertTrue(torch.equal(found[2], wanted[2]))
                    torch.testing.assert_close(found[1], wanted[1], rtol=2**-10, atol=0)
                    torch.testing.assert_close(found[0], wanted[0], rtol=2**-9, atol=2e-3)

    def test_norms_with_a_wide_gain(self):
        """A float32 gain next to float16 rows multiplies before the one rounding; the interpreter cuts bfloat16."""
        generator = torch.Generator().manual_seed(1)
        x, gain = torch.randn(5, 200, generator=generator).half(), torch.rand(200, generator=generator) + 0.5
        self.assertTrue(fits_triton(x, gain))
        found, wanted = rms_norm_triton(x, gain, 1e-6), rms_norm_torch(x, gain, 1e-6)
        torch.testing.assert_close(found, wanted, rtol=2**-11, atol=0)
        twice = rms_norm_torch(x, gain.half(), 1e-6)
        self.assertLess((found != wanted).sum(), (twice != wanted).sum() / 20, "it is rounded twice")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is first imported, library functions included.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    unittest.main()
