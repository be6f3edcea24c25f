"""Attention of many heads for sm_90, which Triton's interpreter does not know: on the CPU against float64."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.kernels.ops.attention import decode_sm90_triton, launchers, tiles
from sglang.kernels.ops.attention.launchers import fits_specialised_warps, launch_parts
from sglang.kernels.ops.attention.tiles import RowShape, Tile
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.gluon_on_cpu import OnHost, check_without_gluon
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-b-test-cpu")

HEADS, WIDTH, VALUE = 128, 576, 512
SHAPE = RowShape.of(WIDTH, VALUE, value_is_key=True)
TILE = Tile(64, 64, 8, 3)


def on_sm90(case: CustomTestCase, arch: str = "sm_90") -> None:
    for module in (launchers, tiles):
        platform = mock.patch.object(module, "current_platform", SimpleNamespace(arch=arch, kind="cuda"))
        case.enterContext(platform)


class TestBodies(CustomTestCase):
    def setUp(self):
        on_sm90(self)
        kernel = OnHost(decode_sm90_triton.decode_heads_sm90_kernel)
        self.enterContext(mock.patch.object(decode_sm90_triton, "decode_heads_sm90_kernel", kernel))
        # Threads of a product in each of three threads would wait for one another.
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)

    def test_lengths_at_the_edges_of_blocks(self):
        self.check([0, 1, 32, 33, 64, 65, 130], torch.bfloat16, 1)

    def test_more_spans_than_blocks(self):
        """Some spans are empty, and a slot is filled several times: spans of 192 tokens have six of four slots."""
        self.check([0, 64, 65, 450], torch.float16, 3)

    def test_nan_stays_with_its_request(self):
        for end in (70, 140):  # of the first of two spans, and of the last block
            found, wanted = self.both([140, 40], torch.bfloat16, 2, spoiled=end - 1)
            self.assertTrue(bool(found[0].isnan().all()))
            torch.testing.assert_close(found[1], wanted[1], rtol=0.02, atol=0.02)

    def check(self, lens: list[int], dtype: torch.dtype, splits: int) -> None:
        found, wanted = self.both(lens, dtype, splits)
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)

    def both(
        self, lens: list[int], dtype: torch.dtype, splits: int, spoiled: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's parts, merged, and the truth, [B, H, 512] float64; slots that nobody has hold NaN."""
        generator = torch.Generator().manual_seed(len(lens))
        total, scale = sum(lens) + 8, 0.05
        latent = torch.randn(total, WIDTH, generator=generator).to(dtype)
        q = (2 * torch.randn(len(lens), HEADS, WIDTH, generator=generator)).to(dtype)
        free = torch.randperm(total, generator=generator)
        table = torch.full((2 * len(lens) + 1, max(lens) + 2), int(free[-1]), dtype=torch.int32)
        rows, own = torch.arange(len(lens)).flip(0) * 2 + 1, free[:-8].split(lens)
        latent[free[-8:]] = torch.nan
        if spoiled is not None:
            latent[own[0][spoiled], 3] = torch.nan
        wanted = torch.zeros(len(lens), HEADS, VALUE, dtype=torch.float64)
        for number, slots in enumerate(own):
            table[rows[number], : len(slots)] = slots.int()
            keys = latent[slots].double()
            if len(slots):
                wanted[number] = (q[number].double() @ keys.T * scale).softmax(-1) @ keys[:, :VALUE]
        k = latent.unsqueeze(1)
        parts, lse = launch_parts(q, k, k, table, rows, torch.tensor(lens), scale, SHAPE, splits=splits)
        if lse is None:
            return parts.double(), wanted
        used = lse > -torch.inf  # a NaN is used too
        used |= lse.isnan()
        weights = torch.where(lse.isnan().any(1, keepdim=True), torch.nan, lse.double().softmax(1).nan_to_num(0.0))
        merged = (torch.where(used[..., None], parts.double(), 0.0) * weights[..., None]).sum(1)
        return merged, wanted


class TestWhenItRuns(CustomTestCase):
    def setUp(self):
        on_sm90(self)

    def fits(self, q=None, k=None, shape=SHAPE, tile=TILE, repeat=1) -> bool:
        q = torch.empty(2, HEADS, WIDTH, dtype=torch.bfloat16) if q is None else q
        k = torch.empty(8, 1, WIDTH, dtype=torch.bfloat16) if k is None else k
        return fits_specialised_warps(q, k, shape, tile, repeat)

    def test_sizes_dtypes_and_layouts(self):
        bf16 = torch.bfloat16
        self.assertTrue(self.fits())
        self.assertFalse(self.fits(repeat=2), "several queries over one span")
        self.assertFalse(self.fits(q=torch.empty(2, 96, WIDTH, dtype=bf16)), "half of a block of heads")
        self.assertFalse(self.fits(k=torch.empty(8, 2, WIDTH, dtype=bf16)), "two key heads")
        self.assertFalse(self.fits(k=torch.empty(8, 1, WIDTH, dtype=torch.float8_e4m3fn)), "rows of 8 bits")
        self.assertFalse(self.fits(q=torch.empty(2, HEADS, WIDTH), k=torch.empty(8, 1, WIDTH)), "float32")
        self.assertFalse(self.fits(k=torch.empty(8, 1, WIDTH + 8, dtype=bf16)[..., :WIDTH]), "rows 1,168 bytes apart")
        self.assertFalse(self.fits(k=torch.empty(9 * WIDTH, dtype=bf16)[8:-568].view(8, 1, WIDTH)), "16 bytes off")
        self.assertFalse(self.fits(shape=RowShape.of(320, 256, value_is_key=True)), "rows of 256 and 64 columns")
        self.assertFalse(self.fits(tile=Tile(32, 64, 8, 3)))
        on_sm90(self, "sm_100")
        self.assertFalse(self.fits())

    def test_without_the_language_triton_s_kernel_runs(self):
        check_without_gluon(self, decode_sm90_triton, self.fits)


if __name__ == "__main__":
    unittest.main()
