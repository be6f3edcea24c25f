"""Rows of compressed attention in 8 bits: their bytes in a page, what rounding costs, and numbers that do not fit."""

import math
import unittest

import torch

from sglang.kernels.ops.attention.packed_rows import load_rows, store_rows_torch
from sglang.kernels.ops.quant.group_fp8 import FP8_DTYPES
from sglang.srt.configs.cache_layout import FULL, CacheLayout, PoolSpec
from sglang.srt.configs.deepseek_v4_cache import packed_keys, packed_rows
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.test.cache_pools import make_pages
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.packed_truth import float_of_byte, true_row, true_rows
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

DIM, ROPE, KEY = 512, 64, 128


def name(dtype):
    return str(dtype).removeprefix("torch.")


def pool(buffer, pages=3):
    """A pool of two layers whose page of 256 tokens is ``buffer``."""
    layout = CacheLayout((PoolSpec("rows", FULL, (4, 7), (buffer,), 256),))
    return ModelPools(layout, {FULL: 256 * (pages - 1)}, 256, "cpu")["rows"]


class TestBytes(CustomTestCase):
    def test_bytes_of_a_page(self):
        """FlashMLA's pages of 256, 64 and 2 rows, and the indexer's of 64 keys; 585 and 864 bytes per row."""
        for num_rows, size in ((256, 149_760), (64, 37_440), (2, 1728)):
            self.assertEqual(packed_rows(num_rows, DIM, ROPE, "float8_e4m3fn").row_shape, (size,))
        self.assertEqual(packed_keys(64, KEY, "float8_e4m3fnuz").row_shape, (64 * 132,))

    def test_a_row_stands_where_the_format_says(self):
        generator = torch.Generator().manual_seed(0)
        for dtype in FP8_DTYPES:
            for num_rows, row_id in ((256, 256 + 255), (64, 2 * 64), (2, 5)):
                found = pool(packed_rows(num_rows, DIM, ROPE, name(dtype)))
                row = torch.randn(1, DIM, generator=generator)
                store_rows_torch(row, torch.tensor([row_id]), *found.layer(7))
                page, place = row_id // num_rows, row_id % num_rows
                raw = found.buffers()[0][1, page].clone()
                values = raw[576 * place :][:576]
                scales = raw[576 * num_rows + 8 * place :][:8]
                decoded = torch.tensor(true_row(bytes(values.tolist()), bytes(scales.tolist()), DIM, dtype))
                self.assertLess(float((decoded - row[0]).abs().max()), 0.07 * float(row.abs().max()))
                self.assertTrue(torch.equal(decoded[-ROPE:], row[0, -ROPE:].bfloat16().float()))
                # Nothing else of the page is written, the last byte of the scales included, and no other page or layer.
                self.assertEqual(int(scales[7]), 0)
                values.zero_(), scales.zero_()
                self.assertFalse(bool(raw.any()))
                self.assertFalse(bool(found.buffers()[0][0].any()))
                self.assertEqual(int(found.buffers()[0][1].any(1).sum()), 1)

    def test_a_key_stands_where_the_format_says(self):
        keys = torch.randn(2, KEY, generator=torch.Generator().manual_seed(0))
        found = pool(packed_keys(64, KEY, "float8_e4m3fn"))
        store_rows_torch(keys, torch.tensor([65, 127]), *found.layer(4))
        page = found.buffers()[0][0, 1]
        for key, place in zip(keys, (1, 63), strict=True):
            scale = page[64 * KEY + 4 * place :][:4].clone().view(torch.float32)
            self.assertAlmostEqual(float(scale), float(key.abs().max()) / 448, places=7)
            values = [float_of_byte(byte, torch.float8_e4m3fn) for byte in page[KEY * place :][:KEY].tolist()]
            self.assertLess(float((torch.tensor(values) * scale - key).abs().max()), 0.04 * float(key.abs().max()))

    def test_odd_columns_are_refused(self):
        for dim, rope in ((25, 8), (24, 7)):
            with self.assertRaisesRegex(ValueError, "pairs of columns.*use --kv-cache-dtype bfloat16"):
                packed_rows(4, dim, rope, "float8_e4m3fn")


class TestRounding(CustomTestCase):
    def test_powers_are_the_smallest_that_fit(self):
        """The largest of a group, around each edge of a power: exact sizes, one unit above, and far out."""
        for dtype in FP8_DTYPES:
            most = torch.finfo(dtype).max
            tops = [most * 2.0**k for k in (-30, -3, 0, 1, 100)]
            tops += [math.nextafter(top, math.inf) * (1 + 2**-23) for top in tops] + [1e-30, 0.0]
            rows = torch.zeros(len(tops), DIM)
            rows[:, 64 * 3 + 5] = torch.tensor(tops)
            cache, scales = make_pages(len(tops), 1, DIM, ROPE, dtype)
            store_rows_torch(rows, torch.arange(len(tops)), cache, scales)
            for top, exponent in zip(rows[:, 64 * 3 + 5].tolist(), scales[:, 0, 3].tolist(), strict=True):
                power = math.ceil(math.log2(max(top, 1e-8)) - math.log2(most) - 1e-9)
                power += most * 2.0**power < top
                self.assertEqual(exponent - 127, power, (dtype, top))

    def test_error_of_a_number(self):
        generator = torch.Generator().manual_seed(1)
        for dtype in FP8_DTYPES:
            rows = torch.randn(64, DIM, generator=generator) * torch.logspace(-5, 5, 64)[:, None]
            cache = make_pages(16, 4, DIM, ROPE, dtype)
            store_rows_torch(rows, torch.arange(64), *cache)
            found = load_rows(*cache, torch.arange(64), DIM)
            torch.testing.assert_close(found.double(), true_rows(*cache, DIM), rtol=0, atol=0)
            top = rows[:, :448].unflatten(1, (7, 64)).abs().amax(2).repeat_interleave(64, 1)
            # Half a unit of three bits of fraction, or of the smallest number that the scale leaves.
            bound = torch.maximum(rows[:, :448].abs() / 16, top * 2.0**-16)
            self.assertTrue(bool(((found - rows)[:, :448].abs() <= bound).all()))

    def test_minus_zero_and_what_rounds_to_it(self):
        """Byte 0x80 is minus zero in OCP's format and NaN in FNUZ."""
        rows = torch.full((2, DIM), -0.0)
        rows[1, ::2], rows[1, 1::2] = 1.0, -1e-9
        for dtype in FP8_DTYPES:
            for tail, dim in ((ROPE, DIM), (None, KEY)):
                cache = make_pages(1, 2, dim, tail, dtype)
                store_rows_torch(rows[:, :dim], torch.arange(2), *cache)
                plain = cache[0].view(torch.uint8)[..., : dim - (tail or 0)]
                if dtype == torch.float8_e4m3fnuz:
                    self.assertFalse(bool((plain == 0x80).any()))
                self.assertTrue(bool(load_rows(*cache, torch.arange(2), dim).isfinite().all()))

    def test_what_is_not_finite_stays_so(self):
        """A group with such a number reads as NaN, in FNUZ without its NaN, and no other group does."""
        for dtype in FP8_DTYPES:
            for bad in (math.nan, math.inf, -math.inf):
                rows = torch.ones(3, DIM)
                rows[1, 70], rows[1, -1] = bad, bad
                cache = make_pages(2, 2, DIM, ROPE, dtype)
                store_rows_torch(rows, torch.arange(3), *cache)
                self.assertFalse(bool((cache[0].view(torch.uint8)[..., :448] == 0x80).any()))
                found = load_rows(*cache, torch.arange(3), DIM)
                self.assertTrue(bool(found[1, 64:128].isnan().all()))
                rest = torch.cat((found[1, :64], found[1, 128:448], found[0], found[2]))
                self.assertTrue(bool((rest == 1).all()))
                self.assertFalse(bool(found[1, -1].isfinite()))
                keys = make_pages(2, 2, KEY, None, dtype)
                store_rows_torch(rows[:, :KEY], torch.arange(3), *keys)
                found = load_rows(*keys, torch.arange(3), KEY)
                self.assertTrue(bool(found[1].isnan().all() and (found[::2] - 1).abs().max() < 0.04))

    def test_each_pool_is_read_in_its_own_format(self):
        """Two pools of one process, one of each: no flag of the process decides."""
        rows = torch.randn(4, DIM, generator=torch.Generator().manual_seed(2))
        read = []
        for dtype in FP8_DTYPES:
            cache = pool(packed_rows(2, DIM, ROPE, name(dtype))).layer(4)
            self.assertEqual(cache[0].dtype, dtype)
            store_rows_torch(rows, torch.arange(4), *cache)
            read.append(load_rows(*cache, torch.arange(4), DIM))
        for found in read:
            self.assertLess(float((found - rows).abs().max()), 0.07 * float(rows.abs().max()))


if __name__ == "__main__":
    unittest.main()
