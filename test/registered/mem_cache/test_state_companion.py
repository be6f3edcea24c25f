"""The prefix cache with recurrent states against a dictionary of prefixes, and corner cases by hand."""

import unittest
from collections.abc import Sequence

import torch

from sglang.srt.configs.cache_layout import STATE
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import RadixIntegrityError, check_integrity
from sglang.srt.mem_cache.state_companion import StateCompanion
from sglang.srt.mem_cache.tree_node import MatchResult, TreeNode
from sglang.test import prefix_cache_truth
from sglang.test.cache_pools import state_slots
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")


class TestAgainstTruth(prefix_cache_truth.RandomServing):
    num_states, least = (2, 3, 7), 2
    events = (
        "hit", "kv beyond state", "duplicates", "evicted for memory", "snapshot", "no state available",
        "state evicted for a request", "state held",
    )  # fmt: skip


class TestByHand(CustomTestCase):
    def setUp(self) -> None:
        self.make()

    def make(self, page_size: int = 1, num_states: int = 4, disable: bool = False) -> None:
        self.allocator = TokenToKVPoolAllocator(64 * page_size, page_size)
        self.states, pool = state_slots(num_states, [0], (2, 2), (1, 3, 2), torch.float32, torch.float32)
        self.ssm = pool.layer(0)[1]
        self.kept = StateCompanion(self.states)
        self.cache = RadixCache(self.allocator, page_size, disable=disable, companions=[self.kept])

    def put(self, tokens: list[int], value: float | None = None):
        """Insert with new slots; with a value, snapshot a live state filled with it."""
        slots = self.allocator.alloc_extend([0], [len(tokens)], [-1])
        if value is None:
            result = self.cache.insert(tokens, slots)
        else:
            live = self.states.alloc()
            self.ssm[live] = value
            result = self.cache.insert(tokens, slots)
            self.kept.on_insert(result, len(tokens), live)
            self.states.free(live)
        self.allocator.free(slots[: result.prefix_len])
        self.allocator.free(slots[result.cached_len :])
        check_integrity(self.cache, held=0, held_units={})
        return result

    def state_of(self, match: MatchResult) -> int | None:
        return self.kept._kept.get(match.node)

    def value(self, slot: int) -> float:
        return float(self.ssm[slot].mean())

    def test_match_stops_at_the_deepest_state(self) -> None:
        self.put([1, 2, 3], 3.0)
        self.put([1, 2, 3, 4, 5, 6], None)
        match = self.cache.match_prefix([1, 2, 3, 4, 5, 9])
        self.assertEqual((match.slot_ids.numel(), match.kv_len, self.value(self.state_of(match))), (3, 5, 3.0))
        nothing = self.cache.match_prefix([1, 2])
        self.assertEqual((nothing.slot_ids.numel(), nothing.kv_len, self.state_of(nothing)), (0, 2, None))
        self.assertIs(nothing.node, self.cache.root)
        # The hint: a snapshot where the KV match ended makes the next request hit there.
        self.put([1, 2, 3, 4, 5], 5.0)
        match = self.cache.match_prefix([1, 2, 3, 4, 5, 9])
        self.assertEqual((match.slot_ids.numel(), self.value(self.state_of(match))), (5, 5.0))

    def test_split_leaves_the_state_below(self) -> None:
        self.put([1, 2, 3, 4], 4.0)
        self.put([1, 2, 9, 9], 9.0)
        self.assertEqual(self.cache.match_prefix([1, 2, 7]).slot_ids.numel(), 0)
        self.assertEqual(self.value(self.state_of(self.cache.match_prefix([1, 2, 3, 4]))), 4.0)
        self.assertEqual(self.value(self.state_of(self.cache.match_prefix([1, 2, 9, 9]))), 9.0)

    def test_unaligned_end_is_cached_without_state(self) -> None:
        self.make(page_size=4)
        result = self.put(list(range(10)), 10.0)
        self.assertEqual((result.cached_len, len(self.kept._kept)), (8, 0))
        self.assertEqual(self.cache.match_prefix(list(range(10))).kv_len, 8)
        self.put(list(range(8)), 8.0)
        self.assertEqual(self.cache.match_prefix(list(range(10))).slot_ids.numel(), 8)

    def test_second_snapshot_keeps_the_first(self) -> None:
        self.put([1, 2], 1.0)
        self.put([1, 2], 2.0)
        self.assertEqual(self.value(self.state_of(self.cache.match_prefix([1, 2]))), 1.0)
        self.assertEqual(self.states.available_size(), 3)

    def test_second_snapshot_counts_as_use(self) -> None:
        for tokens in ([1, 1], [2, 2], [1, 1]):
            self.put(tokens, 1.0)
        self.kept.evict(1)
        self.assertIsNone(self.state_of(self.cache.match_prefix([2, 2])))
        self.assertIsNotNone(self.state_of(self.cache.match_prefix([1, 1])))

    def test_live_slot_is_a_copy(self) -> None:
        self.put([1, 2], 2.0)
        match = self.cache.match_prefix([1, 2, 3])
        live = self.kept.fork(match.node)
        self.assertNotEqual(live, self.state_of(match))
        self.ssm[live] += 5
        self.assertEqual(self.value(self.state_of(self.cache.match_prefix([1, 2, 3]))), 2.0)
        self.assertEqual(self.value(self.kept.fork(self.cache.match_prefix([8]).node)), 0.0)

    def test_dry_pool(self) -> None:
        self.make(num_states=3)
        self.put([1, 1], 1.0)
        self.put([2, 2], 2.0)
        match = self.cache.match_prefix([1, 1])
        live = [self.kept.fork(match.node), self.kept.fork(match.node)]  # the second evicts [2, 2]
        self.assertEqual(self.cache.match_prefix([2, 2]).kv_len, 2)
        self.assertIsNone(self.state_of(self.cache.match_prefix([2, 2])))
        live.append(self.kept.fork(match.node))  # the last slot is the tree's own: handed over
        self.assertEqual([self.value(slot) for slot in live], [1.0, 1.0, 1.0])
        self.assertEqual(sorted(live), [1, 2, 3])
        check_integrity(self.cache, held=0, held_units={STATE: live})
        with self.assertRaisesRegex(RadixIntegrityError, "evicted between match and copy"):
            self.kept.fork(match.node)
        self.assertIsNone(self.kept.fork(self.cache.match_prefix([1, 1]).node))
        slots = self.allocator.alloc(2)
        result = self.cache.insert([3, 3], slots)
        self.kept.on_insert(result, 2, live[0])
        self.assertEqual((self.kept._kept.get(result.node), result.cached_len), (None, 2))
        self.assertEqual(self.cache.match_prefix([3, 3]).kv_len, 2)

    def test_kept_state(self) -> None:
        self.put([1, 1], 1.0)
        self.put([2, 2], 2.0)
        oldest = self.cache.match_prefix([1, 1]).node
        self.cache.match_prefix([2, 2])
        self.assertEqual(self.kept.evict(9, keep=oldest), 1)
        self.assertEqual(self.value(self.state_of(self.cache.match_prefix([1, 1]))), 1.0)
        self.assertIsNone(self.state_of(self.cache.match_prefix([2, 2])))

    def test_kv_lock_lets_the_state_go(self) -> None:
        self.put([1, 1], 1.0)
        node = self.cache.match_prefix([1, 1]).node
        self.cache.inc_lock_ref(node)
        self.assertEqual((self.cache.evict(9), self.kept.evict(9)), (0, 1))
        self.assertEqual(self.cache.match_prefix([1, 1]).kv_len, 2)
        self.cache.dec_lock_ref(node)
        check_integrity(self.cache, held=0, held_units={})

    def test_leaves_without_state_go_first(self) -> None:
        self.put([1, 1], 1.0)
        self.put([2, 2], 2.0)
        self.put([3, 3], None)  # newest, but matches nothing
        self.assertEqual(self.cache.evict(1), 2)
        self.assertEqual([self.cache.match_prefix([t, t]).kv_len for t in (1, 2, 3)], [2, 2, 0])
        self.cache.match_prefix([1, 1])
        self.kept.evict(1)  # [2, 2] becomes a tombstone, though used after nothing else
        self.assertEqual(self.cache.evict(1), 2)
        self.assertEqual([self.cache.match_prefix([t, t]).kv_len for t in (1, 2)], [2, 0])
        self.assertEqual(self.cache.evict(1), 2)
        self.assertEqual(self.states.available_size(), 4)

    def test_reset_and_disable(self) -> None:
        self.put([1, 1], 1.0)
        self.cache.reset()
        self.assertEqual((self.states.available_size(), self.allocator.available_size()), (4, 64))
        self.make(disable=True)
        self.assertEqual(self.put([1, 1], 1.0).cached_len, 0)
        self.assertEqual(self.cache.match_prefix([1, 1]).kv_len, 0)
        self.assertIsNotNone(self.kept.fork(self.cache.match_prefix([1, 1]).node))

    def test_integrity_check_finds_damage(self) -> None:
        def check(message: str, held: Sequence[int] = ()) -> None:
            with self.assertRaisesRegex(RadixIntegrityError, message):
                check_integrity(self.cache, held=0, held_units={STATE: held})

        self.put([1, 1], 1.0)
        self.put([2, 2], 2.0)
        one = self.cache.match_prefix([1, 1]).node
        two = self.cache.match_prefix([2, 2]).node
        check("belongs to node .* and to a request", [self.kept._kept.get(one)])
        check("a request owns state slot 4, which is free", [4])
        leaked = self.states.alloc()
        check("1 leaked")
        self.states.free(leaked)
        self.kept._kept[two] = self.kept._kept[one]
        check("state slot 2 belongs to node")
        self.kept._kept[TreeNode(99, two, two.key, two.value)] = self.kept._kept.pop(two)
        check("2 states are kept, 1 of them by nodes of the tree")


if __name__ == "__main__":
    unittest.main()
