"""Pool sizing: the split, the overrides, and refusals that show their arithmetic."""

import math
import unittest

from sglang.srt.configs.cache_layout import FULL, STATE, SWA, BufferSpec, CacheLayout, PoolSpec
from sglang.srt.mem_cache.pool_plan import PoolPlanError, plan_pool_sizes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

KIB = 1024


def layout(bytes_per_token: int, bytes_per_state_slot: int = 0) -> CacheLayout:
    sizes = {FULL: bytes_per_token, STATE: bytes_per_state_slot}
    pools = [PoolSpec(unit, unit, (0,), (BufferSpec("b", (n,), "uint8"),)) for unit, n in sizes.items()]
    return CacheLayout(tuple(pools if bytes_per_state_slot else pools[:1]))


class TestPlainModels(CustomTestCase):
    def test_everything_goes_to_kv(self) -> None:
        plan = plan_pool_sizes(available_bytes=1000 * KIB, layout=layout(KIB), max_running_requests=8)
        self.assertEqual(plan.sizes, {FULL: 999})
        paged = plan_pool_sizes(available_bytes=1000 * KIB, layout=layout(KIB), max_running_requests=8, page_size=64)
        self.assertEqual(paged.sizes[FULL], 896)  # 936 next to the dummy page, in whole pages
        self.assertIn("896 tokens + 1 dummy page of 64 x 1024 B = 983040 B of 1024000 B", paged.lines[-1])
        least = plan_pool_sizes(available_bytes=128 * KIB, layout=layout(KIB), max_running_requests=8, page_size=64)
        self.assertEqual(least.sizes[FULL], 64)

    def test_the_request_table_is_taken_first(self) -> None:
        base = {"available_bytes": 1000 * KIB, "layout": layout(KIB), "max_running_requests": 8}
        plan = plan_pool_sizes(**base, request_table_bytes=400 * KIB)
        self.assertEqual(plan.sizes[FULL], 599)
        self.assertIn("request table: 409600 B, which leaves 614400 B", plan.lines)
        self.assertEqual(plan_pool_sizes(**base, request_table_bytes=998 * KIB).sizes[FULL], 1)
        message = "table of 8 requests .* takes 1022976 B of the 1024000 B.* --max-running-requests or --context-length"
        with self.assertRaisesRegex(PoolPlanError, message):
            plan_pool_sizes(**base, request_table_bytes=999 * KIB)

    def test_override(self) -> None:
        plan = plan_pool_sizes(
            available_bytes=1000 * KIB, layout=layout(KIB), max_running_requests=8, page_size=16, max_total_tokens=100
        )
        self.assertEqual(plan.sizes[FULL], 96)
        self.assertIn("100 -> 96", "\n".join(plan.lines))

    def test_slots_stay_int32(self) -> None:
        plan = plan_pool_sizes(available_bytes=1 << 60, layout=layout(1), max_running_requests=8, page_size=64)
        self.assertLess(plan.sizes[FULL] + 64, 2**31)

    def test_refusals(self) -> None:
        base = {"available_bytes": 100 * KIB, "layout": layout(KIB), "max_running_requests": 8}
        for change, message in (
            ({"max_total_tokens": 100}, r"\(100 \+ 1 dummy\) x 1024 B = 103424 B, and 102400 B are left.*fit 99"),
            ({"page_size": 64}, r"2 x 64 tokens x 1024 B = 131072 B, and 102400 B"),
            ({"page_size": 16, "max_total_tokens": 15}, "less than one page of 16"),
            ({"available_bytes": -5}, "-5 B are left"),
            ({"layout": layout(0)}, "must be positive"),
        ):
            with self.subTest(change), self.assertRaisesRegex(PoolPlanError, message):
                plan_pool_sizes(**{**base, **change})


class TestHybrids(CustomTestCase):
    base = {
        "available_bytes": 1900 * KIB,
        "layout": layout(KIB, 10 * KIB),
        "max_running_requests": 8,
    }

    def plan(self, **change):
        return plan_pool_sizes(**{**self.base, **change})

    def test_split_by_ratio(self) -> None:
        plan = self.plan()
        self.assertEqual(plan.sizes[STATE], 89)  # 900 KiB: 89 and the dummy
        self.assertEqual(plan.sizes[FULL], 999)
        self.assertIn("8 live, 81 for the prefix tree", "\n".join(plan.lines))
        pools = [PoolSpec(name, STATE, (0, 1), (BufferSpec("b", (n,), "uint8"),)) for name, n in (("a", 9), ("b", 3))]
        several = CacheLayout((*layout(KIB).pools, *pools))
        plan = plan_pool_sizes(available_bytes=100 * KIB, layout=several, max_running_requests=8)
        self.assertIn("1 dummy x 24 B (a 18 B + b 6 B) = ", "\n".join(plan.lines))

    def test_without_tree_there_are_only_live_slots(self) -> None:
        plan = self.plan(disable_radix_cache=True)
        self.assertEqual(plan.sizes, {STATE: 8, FULL: 1900 - 90 - 1})

    def test_overrides(self) -> None:
        plan = self.plan(max_mamba_cache_size=20, max_total_tokens=640, page_size=64)
        self.assertEqual(plan.sizes, {STATE: 20, FULL: 640})

    def test_useful_numbers_bound_what_is_chosen_but_not_overrides(self) -> None:
        plan = self.plan(useful_tokens=100, useful_state_slots=12, page_size=64)
        self.assertEqual(plan.sizes, {STATE: 12, FULL: 128})
        self.assertIn("KV: 128 tokens", plan.lines[-1])
        self.assertEqual(self.plan(useful_state_slots=2).sizes[STATE], 8)
        self.assertEqual(self.plan(useful_tokens=100, max_total_tokens=640).sizes[FULL], 640)

    def test_all_fits_what_was_given(self) -> None:
        for available in range(200 * KIB, 2000 * KIB, 77_777):
            for page in (1, 16):
                plan = self.plan(available_bytes=available, page_size=page)
                used = (plan.sizes[STATE] + 1) * 10 * KIB + (plan.sizes[FULL] + page) * KIB
                self.assertLessEqual(used, available)
                self.assertGreaterEqual(plan.sizes[STATE], 8)

    def test_refusals(self) -> None:
        for change, message in (
            ({"available_bytes": 90 * KIB}, r"\(8 state slots \+ 1 dummy\) x 10240 B = 92160 B.*lower max_running"),
            ({"max_mamba_cache_size": 400}, r"\(400 state slots.*or max_mamba_cache_size"),
            ({"max_total_tokens": 1000}, "which fit 999"),
        ):
            with self.subTest(change), self.assertRaisesRegex(PoolPlanError, message):
                self.plan(**change)


class TestWindows(CustomTestCase):
    """256 tokens are a page of 1 KiB per token, and one of 20 KiB per token in the window."""

    base = {
        "available_bytes": 4000 * 256 * KIB,
        "layout": CacheLayout(
            (
                *layout(KIB).pools,
                PoolSpec("rows", SWA, (0,), (BufferSpec("b", (15 * KIB,), "uint8"),)),
                PoolSpec("states", SWA, (0,), (BufferSpec("b", (40 * KIB,), "uint8"),), 8),
            )
        ),
        "max_running_requests": 8,
        "page_size": 256,
    }

    def plan(self, **change):
        plan = plan_pool_sizes(**{**self.base, **change})
        pages, windows = plan.sizes[FULL] // 256, plan.sizes[SWA] // 256
        self.assertEqual((plan.sizes[FULL] % 256, plan.sizes[SWA] % 256), (0, 0))
        used = (pages + 1) + (windows + 2) * 20
        self.assertLessEqual(used, change.get("available_bytes", self.base["available_bytes"]) // (256 * KIB))
        return pages, windows, plan.lines

    def test_a_tenth_unless_told_otherwise(self) -> None:
        pages, windows, lines = self.plan()
        self.assertEqual((pages, windows), (1319, 132))  # 1320 + 134 * 20 = 4000
        self.assertIn(
            "window: 33792 tokens (0.1 of KV) + 2 pages of 256 for padding and tombstones x 20480 B", lines[-4]
        )
        self.assertIn("pool rows: 34304 rows x 15360 B = 502.50 MiB, by swa units", lines)
        self.assertIn("pool states: 4288 rows x 40960 B = 167.50 MiB, by swa units", lines)
        self.assertEqual(self.plan(swa_full_tokens_ratio=1.0)[:2], (188, 188))
        for ratio in (0.05, 0.3, 1.0):
            for available in (900, 4000, 77_777):
                pages, windows, _ = self.plan(available_bytes=available * 256 * KIB, swa_full_tokens_ratio=ratio)
                self.assertEqual(windows, math.ceil(ratio * pages))
                more = (pages + 2) + (math.ceil(ratio * (pages + 1)) + 2) * 20
                self.assertGreater(more, available, "a page more would have fitted")

    def test_memory_that_is_left_goes_to_what_requests_use(self) -> None:
        self.assertEqual(self.plan(useful_tokens=50 * 256)[:2], (50, 24))  # three for each of eight
        self.assertEqual(self.plan(useful_tokens=50 * 256, useful_step_tokens=1025)[:2], (50, 29))
        self.assertEqual(self.plan(max_total_tokens=10 * 256)[:2], (10, 10))
        self.assertEqual(self.plan(max_total_tokens=50 * 256, available_bytes=391 * 256 * KIB)[:2], (50, 15))
        self.assertEqual(self.plan(useful_tokens=50 * 256, swa_full_tokens_ratio=0.1)[:2], (50, 5))

    def test_the_least_with_which_a_request_can_be_served(self) -> None:
        self.assertEqual(self.plan(max_total_tokens=20 * 256, available_bytes=141 * 256 * KIB)[:2], (20, 4))
        self.assertEqual(self.plan(max_total_tokens=2 * 256, available_bytes=83 * 256 * KIB)[:2], (2, 2))
        for change, message in (
            (
                {"max_total_tokens": 30 * 256, "swa_full_tokens_ratio": 0.1},
                "--swa-full-tokens-ratio 0.1 of 7680 tokens is a window pool of 3 pages of 256, and a request may need "
                "4: give at least 0.134, or raise --max-total-tokens",
            ),
            (
                {"available_bytes": 61 * 256 * KIB},
                r"1024 B \+ \(1 \+ 2\) window pages x 5.00 MiB = 15.50 MiB, and 15.25",
            ),
            (
                {"max_total_tokens": 2000 * 256},
                r"256 dummy\) x 1024 B \+ \(200 \+ 2\) window pages x 5.00 MiB = 1.47 GiB.* which fit 337664 tokens",
            ),
        ):
            with self.subTest(change), self.assertRaisesRegex(PoolPlanError, message):
                self.plan(**change)


if __name__ == "__main__":
    unittest.main()
