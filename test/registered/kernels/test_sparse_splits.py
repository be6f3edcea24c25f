"""Which form sparse attention takes: upstream's table of an MI355X at each boundary, and devices without one."""

import unittest

from sglang.kernels.ops.attention.sparse_splits import TILES, sparse_tile, split_count
from sglang.srt.layers.attention.nsa.triton_decode.triton_mla_kernels_decode_optimized import (
    _should_use_fused_dual_scope,
    _should_use_fused_nosplitk,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

QS = (1, 2, 4, 5, 8, 9, 32, 33, 64, 65, 128, 129, 255, 256, 257, 1023, 1024, 4096)
HEADS = (1, 8, 16, 63, 64, 65, 127, 128)
KS = (128, 192, 199, 200, 255, 256, 399, 400, 511, 512, 640, 800, 801, 1023, 1024, 1152, 2048, 8191, 8192)


def upstream_nosplitk(q, h, k):
    """The predicate of sglang PR 26383."""
    if q >= 1024:
        return True
    return h > 64 and k >= 200 and q >= 256


def upstream_dual_scope(q, h, k):
    """The same, for shapes that the first one leaves."""
    if q <= 4:
        return True
    if h <= 64:
        return q <= 256 if k <= 800 else q <= 128 if k >= 1024 else True
    return q <= 32 if k >= 400 else q <= 128


def upstream_splits(q, h, k):
    """Ranges of rows in sglang 0.5.23, of a shape that is split."""
    if q <= 8 and (h >= 128 or k >= 1024):
        return 8 if q <= 4 and k >= 512 else 4
    if 8 < q <= 128 and h <= 64 and k >= 1024:
        return 2
    if q > 64 and k >= 2048:
        return 4 if k >= 8192 else 2
    if h > 64 and q > 8 and k >= 256:
        return 4 if k >= 512 else 2
    return 1


class TestTables(CustomTestCase):
    def test_upstreams_rows_of_an_mi355x(self):
        for q in QS:
            for h in HEADS:
                for k in KS:
                    with self.subTest(q=q, h=h, k=k):
                        one, several = upstream_nosplitk(q, h, k), upstream_dual_scope(q, h, k)
                        self.assertEqual(_should_use_fused_nosplitk(q, h, k, "gfx950"), one)
                        self.assertEqual(_should_use_fused_dual_scope(q, h, k, "gfx950"), several)
                        wanted = upstream_splits(q, h, k) if several and not one else 1
                        self.assertEqual(split_count(q, h, k, arch="gfx950"), wanted)

    def test_what_upstream_gathered_first_is_served_without_a_split(self):
        """More than 64 heads, 400 rows or more, more than 32 queries and fewer than 256: neither predicate takes it."""
        for q in (33, 64, 128, 255):
            for h in (65, 128):
                for k in (400, 640, 1152, 8320):
                    self.assertFalse(_should_use_fused_nosplitk(q, h, k, "gfx950"))
                    self.assertFalse(_should_use_fused_dual_scope(q, h, k, "gfx950"))
                    self.assertEqual(split_count(q, h, k, arch="gfx950"), 1)

    def test_local_heads_decide(self):
        """One of eight ranks has 16 of 128 heads: another branch than the whole model's."""
        self.assertTrue(_should_use_fused_nosplitk(256, 128, 640, "gfx950"))
        self.assertFalse(_should_use_fused_nosplitk(256, 16, 640, "gfx950"))
        self.assertTrue(_should_use_fused_dual_scope(64, 16, 640, "gfx950"))

    def test_without_a_table_splits_fill_the_device(self):
        for arch in ("gfx942", "sm_90", "cpu"):
            self.assertTrue(_should_use_fused_dual_scope(1, 64, 640, arch))
            self.assertTrue(_should_use_fused_nosplitk(4096, 64, 640, arch))
            for q in QS:
                for h in HEADS:
                    for k in KS:
                        count = split_count(q, h, k, arch=arch)
                        self.assertEqual(count == 1, _should_use_fused_nosplitk(q, h, k, arch))
                        self.assertNotEqual(
                            _should_use_fused_nosplitk(q, h, k, arch), _should_use_fused_dual_scope(q, h, k, arch)
                        )
                        self.assertLessEqual(count, max(1, -(-k // sparse_tile(q, h, arch=arch).block_n)))

    def test_scratch_is_bounded(self):
        self.assertLessEqual(4 * 1024 * 128 * 512 * split_count(1024, 128, 8320, arch="gfx942"), 256 << 20)

    def test_every_number_of_heads_has_a_tile(self):
        for (arch, itemsize), tiles in TILES.items():
            self.assertEqual([tile.heads for tile in tiles], sorted((tile.heads for tile in tiles), reverse=True))
            for heads in HEADS:
                for q in QS:
                    self.assertLessEqual(sparse_tile(q, heads, itemsize, arch).heads, max(16, heads))

    def test_heads_are_spread_while_all_programs_run_at_once(self):
        """An H100's 132 multiprocessors: measured to be better on sm_90, and used only there."""
        for q, heads, tile_heads, splits in (
            (1, 64, 16, 10), (8, 64, 16, 4), (32, 64, 16, 1), (33, 64, 16, 1), (34, 64, 64, 3), (256, 64, 64, 1),
            (16, 128, 16, 1), (32, 128, 64, 2), (1024, 128, 64, 1), (1, 8, 16, 10), (4096, 8, 16, 1),
        ):  # fmt: skip
            with self.subTest(q=q, heads=heads):
                self.assertEqual(sparse_tile(q, heads, 2, "sm_90").heads, tile_heads)
                self.assertEqual(split_count(q, heads, 640, arch="sm_90"), splits)
        self.assertEqual(sparse_tile(1, 64, 2, "gfx942").heads, 64)


if __name__ == "__main__":
    unittest.main()
