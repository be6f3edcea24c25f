"""What the planner of prefill steps reserves for running requests, and how much they are expected to use."""

import unittest
from collections.abc import Sequence
from types import SimpleNamespace

from sglang.srt.configs.cache_layout import FULL, SWA
from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_policy import CLIP_NEW_TOKENS, NewTokenRatio, PrefillLimits, PrefillPlanner
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


def request(seq_len: int, computed: int = 0, left: int = 10) -> SimpleNamespace:
    return SimpleNamespace(
        seq_len=seq_len,
        kv_committed_len=computed,
        kv_allocated_len=computed,
        new_tokens_left=left,
        state_boundary=0,
    )


class TestNewTokenRatio(CustomTestCase):
    def test_it_decays_to_a_floor_and_starts_anew(self) -> None:
        for conservativeness, start, floor in ((1.0, 0.7, 0.1), (0.5, 0.35, 0.05), (2.0, 1.0, 0.2), (0.0, 0.0, 0.0)):
            ratio = NewTokenRatio(conservativeness)
            self.assertAlmostEqual(ratio.value, start)
            for _ in range(2 * NewTokenRatio.DECAY_STEPS):
                ratio.decay()
            self.assertAlmostEqual(ratio.value, floor)
            ratio.reset()
            self.assertAlmostEqual(ratio.value, start)

    def test_after_retraction(self) -> None:
        ratio = NewTokenRatio(0.5)
        ratio.after_retraction([SimpleNamespace(output_ids=[0] * 60, max_new_tokens=99)])
        self.assertAlmostEqual(ratio.value, 0.8)
        ratio.after_retraction([SimpleNamespace(output_ids=[0] * 60, max_new_tokens=50)])
        self.assertEqual(ratio.value, 1.0)


class ScarceWindow(PrefixCompanion[int]):
    """A second unit that can run out, of which a request needs no more than 8 at one time."""

    unit, cuttable, is_limit = SWA, True, True

    def __init__(self, free: int) -> None:
        self.free = free

    def room(self) -> int:
        return self.free

    def needs(self, num_tokens: int, running: bool) -> int:
        return min(num_tokens, 4 if running else 8)

    def usable_len(self, node: object, num_tokens: int) -> int:
        return num_tokens

    def fork(self, node: object) -> int:
        return 0

    def num_held(self) -> int:
        return 0

    def _nothing(self, *args: object) -> None:
        pass

    on_match = on_split = on_insert = on_drop = release = check = _nothing


class TestPrefillPlanner(CustomTestCase):
    def planner(
        self,
        free: int,
        running: list[SimpleNamespace],
        chunk: int | None = 16,
        step_width: int = 1,
        step_ahead: int = 0,
        companions: Sequence[ScarceWindow] = (),
    ) -> PrefillPlanner:
        allocator = TokenToKVPoolAllocator(free, page_size=4)
        tree = RadixCache(allocator, 4, companions=companions)
        memory = ReqMemory(allocator, ReqToTokenPool(8, 64), tree, step_width, step_ahead)
        return PrefillPlanner(memory, PrefillLimits(1000, chunk, 8), running, ratio=0.5)

    def test_running_requests_keep_room_to_grow(self) -> None:
        planner = self.planner(100_000, [request(8, 8, left=20), request(8, 8, left=10**6)])
        self.assertEqual(planner._room[FULL], 100_000 - 12 - (CLIP_NEW_TOKENS // 2 + 4))

    def test_room_to_grow_counts_the_tokens_of_a_step(self) -> None:
        for width, room in ((1, 12), (2, 12), (3, 16), (6, 16), (7, 20)):
            planner = self.planner(100_000, [request(8, 8, left=20)], step_width=width)
            self.assertEqual(planner._room[FULL], 100_000 - room, f"a step of {width} tokens")

    def test_a_prompt_that_ends_leaves_slots_for_the_drafts_behind_it(self) -> None:
        for free, ends in ((20, [16]), (24, [20]), (28, [22])):
            planner = self.planner(free, [], chunk=40, step_width=4, step_ahead=2)
            self.assertTrue(planner.add_chunked(request(22)))
            self.assertEqual(planner.ends, ends, f"{free} slots")
            self.assertLessEqual(planner.taken(), free)

    def test_a_begun_prompt_keeps_room_for_its_rest_and_its_output(self) -> None:
        planner = self.planner(1000, [])
        self.assertTrue(planner.add_chunked(request(50, computed=8, left=30)))
        self.assertEqual(planner.ends, [24], "one chunk of 16")
        self.assertEqual(planner._room[FULL], 1000 - (42 + 30 + 4))
        self.assertEqual(planner.taken(), 16)

    def test_it_takes_what_no_other_begun_prompt_took(self) -> None:
        planner = self.planner(24, [], chunk=40)
        self.assertTrue(planner.add_chunked(request(16)))
        self.assertTrue(planner.add_chunked(request(30, computed=2)))
        self.assertEqual(planner.ends, [16, 12], "8 of 24 slots, and the rest of its own page")
        self.assertEqual(planner.taken(), 24)
        self.assertFalse(planner.add_chunked(request(30, computed=4)))

    def test_the_scarcest_unit_limits_a_step_and_its_own_need_a_request(self) -> None:
        planner = self.planner(1000, [], companions=[ScarceWindow(14)])
        self.assertTrue(planner.add_chunked(request(50, computed=8, left=30)))
        self.assertEqual(planner.ends, [20], "three pages of window tokens, not a chunk of 16")
        self.assertEqual(planner._room, {FULL: 1000 - (42 + 30 + 4), SWA: 14 - 12})
        running = [request(8, 8, left=20), request(8, 8, left=0)]
        planner = self.planner(1000, running, companions=[ScarceWindow(14)])
        self.assertEqual(planner._room, {FULL: 1000 - 12 - 4, SWA: 14 - 4 - 4})
        self.assertFalse(planner._room.holds({FULL: 1, SWA: 7}))
        self.assertTrue(planner._room.holds({FULL: 984, SWA: 6, "state": 9}))


if __name__ == "__main__":
    unittest.main()
