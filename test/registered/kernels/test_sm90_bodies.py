"""The experts' kernel for sm_90, which Triton's interpreter does not know: on the CPU against the reference."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul_torch
from sglang.kernels.ops.moe import fused_experts, fused_experts_sm90_triton
from sglang.kernels.ops.moe.fused_experts import Scaled, expert_product, fits_slots
from sglang.kernels.ops.moe.tiles import choose_tiles
from sglang.kernels.ops.quant import group_fp8
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.gluon_on_cpu import OnHost, check_without_gluon, order_on_host
from sglang.test.op_cases.quant import random_blocks
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=12, suite="stage-b-test-cpu")

FP8 = torch.float8_e4m3fn
TILE = {"SLOTS": 4, "GROUP_M": 2}
PROGRAMS = 3


def stacked(experts: int, rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype) -> Scaled:
    if dtype != FP8:
        return Scaled((torch.randn(experts, rows, columns, generator=generator) / columns**0.5).to(dtype))
    data, scales = zip(*(random_blocks(rows, columns, generator) for _ in range(experts)), strict=True)
    return Scaled(torch.stack(data), torch.stack(scales))


class TestBodies(CustomTestCase):
    def setUp(self):
        for name, value in (("multiprocessors", lambda arch: PROGRAMS), ("triton_dtype", lambda dtype: dtype)):
            self.enterContext(mock.patch.object(fused_experts, name, value))
        kernel = OnHost(fused_experts_sm90_triton.many_tokens_sm90_kernel)
        self.enterContext(mock.patch.object(fused_experts_sm90_triton, "many_tokens_sm90_kernel", kernel))
        # Threads of a product in each of three threads would wait for one another.
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)

    def test_full_blocks_and_others(self):
        """Also pairs of nobody, an expert with one pair, more tiles than programs, and more steps than slots."""
        ids = torch.randint(-1, 4, (150, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        ids[:100, 0] = 2
        ids[ids == 1] = 3
        ids[7, 1] = 1
        self.check(ids, 512, 256, 0.5)
        for slots in (3, 4):
            with self.subTest(slots=slots):
                self.check_16_bits(ids, 512, 256, 0.5, slots)

    def test_fewer_steps_than_slots(self):
        """Of the second product one step per tile, and one tile per block."""
        for counts in ([3], [64], [128], [65, 0, 129], [0, 0, 1]):
            ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(2))
            with self.subTest(counts=counts):
                self.check(ids[order].int()[:, None], 256, 128, None)
                self.check_16_bits(ids[order].int()[:, None], 256, 128, None, 4)

    def test_no_pair_of_anybody_ends(self):
        ids = torch.full((40, 2), -1, dtype=torch.int32)
        self.check(ids, 256, 128, None)
        self.check_16_bits(ids, 256, 128, None, 4)

    def check(self, ids: torch.Tensor, hidden: int, width: int, limit: float | None) -> None:
        """Both products of ``ids`` at 4 experts; the middle row has a NaN, which must not get lost."""
        generator = torch.Generator().manual_seed(3)
        (tokens, top_k), dtype = ids.shape, torch.bfloat16
        pairs = (ids.flatten() >= 0).nonzero().flatten()
        w13, w2 = (stacked(4, *size, generator, FP8) for size in ((2 * width, hidden), (hidden, width)))
        rows = torch.randn(tokens, hidden, generator=generator).to(dtype)
        rows[tokens // 2, hidden // 3] = float("nan")
        x = Scaled(*group_fp8.quantize_groups_torch(rows, FP8))
        order = order_on_host(ids, 4, 128)
        found = expert_product(x, w13, ids, order, TILE, 128, True, dtype, limit)
        gate_up = self.products(x, w13, ids, pairs, pairs // top_k).to(dtype)
        q, scale = group_fp8.quantize_groups_torch(silu_and_mul_torch(gate_up, limit), FP8)
        made, wanted = found.data[pairs].float(), q.float()
        torch.testing.assert_close(found.scale[pairs], scale, rtol=2**-7, atol=0, equal_nan=True)
        torch.testing.assert_close(made, wanted, rtol=2**-3, atol=1.0, equal_nan=True)
        self.assertGreaterEqual(int((made == wanted).sum()), 0.97 * int((wanted == wanted).sum()))
        down = expert_product(found, w2, ids, order, TILE, 128, False, dtype).data[pairs]
        wanted = self.products(found, w2, ids, pairs, pairs)
        torch.testing.assert_close(down.float(), wanted, rtol=2**-7, atol=2**-7, equal_nan=True)

    def check_16_bits(self, ids: torch.Tensor, hidden: int, width: int, limit: float | None, slots: int) -> None:
        """The same with rows and weights of bfloat16 and no scales, against sums in float64."""
        generator = torch.Generator().manual_seed(3)
        (tokens, top_k), dtype, tile = ids.shape, torch.bfloat16, {"SLOTS": slots, "GROUP_M": 2}
        pairs = (ids.flatten() >= 0).nonzero().flatten()
        w13, w2 = (stacked(4, *size, generator, dtype) for size in ((2 * width, hidden), (hidden, width)))
        x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        x[tokens // 2, hidden // 3] = float("nan")
        order = order_on_host(ids, 4, 128)
        found = expert_product(Scaled(x), w13, ids, order, tile, 128, True, dtype, limit)
        down = expert_product(found, w2, ids, order, tile, 128, False, dtype)
        for made, w, rows, activated in ((found, w13, x[pairs // top_k], True), (down, w2, found.data[pairs], False)):
            wanted, owners = torch.zeros(len(pairs), w.data.shape[1], dtype=dtype), ids.flatten()[pairs]
            for expert in owners.unique().tolist():
                mine = owners == expert
                wanted[mine] = (rows[mine].double() @ w.data[expert].double().T).to(dtype)
            wanted = silu_and_mul_torch(wanted, limit) if activated else wanted
            self.assertEqual((made.scale, made.data.dtype), (None, dtype))
            torch.testing.assert_close(made.data[pairs], wanted, rtol=2**-7, atol=2**-10, equal_nan=True)

    def products(
        self, x: Scaled, w: Scaled, ids: torch.Tensor, pairs: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        out, owners = torch.zeros(len(pairs), w.data.shape[1]), ids.flatten()[pairs]
        for expert in owners.unique().tolist():
            mine = owners == expert
            operands = x.data[rows[mine]], x.scale[rows[mine]], w.data[expert], w.scale[expert]
            out[mine] = group_fp8.scaled_product(*operands).float()
        return out


class TestWhenItRuns(CustomTestCase):
    def setUp(self):
        self.arch("sm_90")

    def arch(self, name: str) -> None:
        self.enterContext(mock.patch.object(fused_experts, "current_platform", SimpleNamespace(arch=name)))

    def fits(self, hidden=256, width=128, x=None, dtype=FP8, scaled=True, **changed) -> bool:
        x = torch.empty(8, hidden, dtype=dtype) if x is None else x
        w13 = torch.empty(2, 2 * width, hidden, dtype=dtype)
        weights = {"w13": w13, "w2": torch.empty(2, hidden, width, dtype=dtype)} | changed
        scale = torch.empty(1) if scaled else None
        return fits_slots(Scaled(x, scale), *(Scaled(one, scale) for one in weights.values()))

    def test_sizes_and_layouts(self):
        self.assertTrue(self.fits())
        self.assertTrue(self.fits(hidden=512, width=384))
        self.assertFalse(self.fits(hidden=384), "tiles of twice 128 columns")
        self.assertFalse(self.fits(width=192), "a group of scales")
        self.assertFalse(self.fits(dtype=torch.float16), "operands of the interpreter")
        self.assertFalse(self.fits(scaled=False), "8 bits without scales")
        self.assertFalse(self.fits(w13=torch.empty(2, 512, 256, dtype=FP8)[:, ::2]), "weights with gaps")
        self.assertFalse(self.fits(w2=torch.empty(2, 128, 256, dtype=FP8).transpose(1, 2)), "transposed weights")
        self.assertFalse(self.fits(x=torch.empty(8 * 256 + 8, dtype=FP8)[8:].view(8, 256)), "rows at 8 bytes")
        self.assertFalse(self.fits(x=torch.empty(8, 264, dtype=FP8)[:, :256]), "rows 264 bytes apart")
        bits_16 = {"dtype": torch.bfloat16, "scaled": False}
        self.assertTrue(self.fits(hidden=2048, width=1408, **bits_16))
        for dtype in (torch.float16, torch.float32):
            self.assertFalse(self.fits(hidden=2048, width=1408, dtype=dtype, scaled=False))
        self.assertFalse(self.fits(x=torch.empty(8, 256, dtype=torch.float16), **bits_16), "rows of another type")
        self.assertTrue(self.fits(x=torch.empty(8, 264, dtype=torch.bfloat16)[:, :256], **bits_16))
        self.assertFalse(self.fits(x=torch.empty(8, 260, dtype=torch.bfloat16)[:, :256], **bits_16), "520 bytes apart")
        self.assertFalse(self.fits(hidden=384, **bits_16), "tiles of 256 columns")
        self.assertFalse(self.fits(width=192, **bits_16), "tiles of 128 columns of each projection")
        self.arch("sm_100")
        self.assertFalse(self.fits())

    def test_without_the_language_triton_s_tiles_run(self):
        check_without_gluon(self, fused_experts_sm90_triton, self.fits)

    def test_rows_per_expert(self):
        """A table without the row takes Triton's tile, and so do few rows per expert and sizes that do not fit."""
        for arch, bits, tokens, slots, wanted in (
            ("sm_90", 8, 192, True, False),
            ("sm_90", 8, 193, True, True),
            ("sm_90", 8, 8192, True, True),
            ("sm_90", 8, 8192, False, False),
            ("sm_90", 16, 128, True, False),
            ("sm_90", 16, 129, True, True),
            ("sm_90", 16, 8192, False, False),
            ("sm_90", 32, 8192, True, False),
            ("gfx942", 8, 8192, True, False),
            ("gfx942", 16, 8192, True, False),
        ):
            tiles = choose_tiles(arch, bits, tokens, 8, 64, slots)
            for tile in (tiles.gate_up, tiles.down):
                with self.subTest(arch=arch, bits=bits, tokens=tokens, slots=slots):
                    self.assertEqual("SLOTS" in tile, wanted)
                    self.assertEqual("BLOCK_N" in tile, not wanted)
            self.assertTrue(not wanted or tiles.block_m == fused_experts_sm90_triton.ROWS.value)


if __name__ == "__main__":
    unittest.main()
