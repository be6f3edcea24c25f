"""The prefix cache against a dictionary of prefixes, and corner cases by hand."""

import unittest

import numpy as np
import torch

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import RadixIntegrityError, check_integrity
from sglang.test import prefix_cache_truth
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")


class TestAgainstTruth(prefix_cache_truth.RandomServing):
    num_states, least = (0, 0, 0), 4
    events = ("hit", "duplicates", "evicted for memory", "retracted")


class CacheCase(CustomTestCase):
    def make(self, page_size: int = 1, size: int = 64, **kwargs) -> RadixCache:
        self.allocator = TokenToKVPoolAllocator(size, page_size)
        return RadixCache(self.allocator, page_size, **kwargs)

    def put(self, cache: RadixCache, tokens: list[int]):
        """Insert with new slots, as a finished request would."""
        slots = self.allocator.alloc_extend([0], [len(tokens)], [-1])
        result = cache.insert(tokens, slots)
        self.allocator.free(slots[: result.prefix_len])
        self.allocator.free(slots[result.cached_len :])
        return result, slots

    def hit(self, cache: RadixCache, tokens: list[int]) -> int:
        return cache.match_prefix(tokens).slot_ids.numel()


class TestMatchAndInsert(CacheCase):
    def test_corners(self) -> None:
        cache = self.make()
        empty = cache.match_prefix([])
        self.assertEqual((empty.slot_ids.tolist(), empty.node, empty.kv_len), ([], cache.root, 0))
        self.assertEqual(cache.insert([], torch.empty(0, dtype=torch.int64)).cached_len, 0)
        result, slots = self.put(cache, [5])
        self.assertEqual((result.prefix_len, result.cached_len), (0, 1))
        self.assertEqual(cache.match_prefix([5, 6]).slot_ids.tolist(), slots.tolist())
        self.assertEqual(self.hit(cache, [6]), 0)
        self.put(cache, [5, 6, 7])
        self.assertEqual([self.hit(cache, t) for t in ([5, 6, 7, 8], [5, 6], [5, 7])], [3, 2, 1])
        check_integrity(cache, held=0)

    def test_duplicate_insert_keeps_the_first_slots(self) -> None:
        cache = self.make()
        _, first = self.put(cache, [1, 2, 3])
        result, _ = self.put(cache, [1, 2, 3])
        self.assertEqual((result.prefix_len, result.cached_len), (3, 3))
        self.assertEqual(cache.match_prefix([1, 2, 3]).slot_ids.tolist(), first.tolist())
        self.assertEqual(cache.path_slots(result.node).tolist(), first.tolist())
        self.assertEqual(self.put(cache, [1, 2, 9])[0].prefix_len, 2)
        self.assertEqual(cache.total_size(), 4)
        check_integrity(cache, held=0)

    def test_only_whole_pages_are_cached(self) -> None:
        cache = self.make(page_size=4)
        result, slots = self.put(cache, list(range(10)))
        self.assertEqual((result.cached_len, cache.total_size()), (8, 8))
        self.assertEqual(cache.match_prefix(list(range(7))).slot_ids.tolist(), slots[:4].tolist())
        self.assertEqual(self.hit(cache, [0, 1, 2, 9, 4]), 0)  # the first page differs in its last token
        self.assertEqual(self.hit(cache, [0, 1, 2]), 0)
        check_integrity(cache, held=0)

    def test_token_containers(self) -> None:
        cache = self.make()
        tokens = np.array([2**40, 3, 4])
        self.put(cache, tokens)
        tokens[1] = 9  # the tree keeps its own copy
        for same in ([2**40, 3, 4], (2**40, 3, 4), np.array([2**40, 3, 4], dtype=np.int64)):
            self.assertEqual(self.hit(cache, same), 3)
        self.assertEqual(self.hit(cache, [0, 3, 4]), 0)

    def test_bad_arguments(self) -> None:
        cache = self.make(page_size=4)
        with self.assertRaisesRegex(ValueError, "4 tokens and 3 slots"):
            cache.insert([1, 2, 3, 4], torch.tensor([4, 5, 6]))
        with self.assertRaisesRegex(ValueError, "whole pages of 4"):
            cache.insert([1, 2, 3, 4], torch.tensor([5, 6, 7, 8]))
        with self.assertRaisesRegex(ValueError, "allocator's 4"):
            RadixCache(TokenToKVPoolAllocator(8, 4), 2)
        self.assertEqual(cache.total_size(), 0)

    def test_disabled(self) -> None:
        cache = self.make(disable=True)
        result, _ = self.put(cache, [1, 2, 3])
        self.assertEqual((result.prefix_len, result.cached_len, result.node), (0, 0, cache.root))
        self.assertEqual(self.hit(cache, [1, 2, 3]), 0)
        cache.inc_lock_ref(result.node)
        cache.dec_lock_ref(result.node)
        self.assertEqual((cache.evict(10), cache.total_size()), (0, 0))
        check_integrity(cache, held=0)


class TestLocksAndEviction(CacheCase):
    def test_least_recently_used_leaf_goes_first(self) -> None:
        cache = self.make()
        for tokens in ([1, 2], [3, 4], [5, 6]):
            self.put(cache, tokens)
        self.hit(cache, [1, 2])
        self.assertEqual(cache.evict(1), 2)
        self.assertEqual([self.hit(cache, t) for t in ([3, 4], [1, 2], [5, 6])], [0, 2, 2])
        self.assertEqual(cache.evict(2), 2)  # [1, 2] was used before [5, 6] just now
        self.assertEqual([self.hit(cache, t) for t in ([1, 2], [5, 6])], [0, 2])

    def test_split_under_a_lock(self) -> None:
        cache = self.make()
        result, slots = self.put(cache, [1, 2, 3, 4])
        cache.inc_lock_ref(result.node)
        self.put(cache, [1, 2, 9])  # splits the locked edge
        self.assertEqual((cache.protected_size(), cache.evictable_size()), (4, 1))
        self.assertEqual(cache.evict(100), 1)
        self.assertEqual(cache.match_prefix([1, 2, 3, 4]).slot_ids.tolist(), slots.tolist())
        cache.dec_lock_ref(result.node)
        self.assertEqual((cache.protected_size(), cache.evictable_size()), (0, 4))
        with self.assertRaisesRegex(RadixIntegrityError, "unlocked more often"):
            cache.dec_lock_ref(result.node)
        self.assertEqual(cache.evict(100), 4)
        self.assertEqual(self.allocator.available_size(), 64)

    def test_reset(self) -> None:
        cache = self.make()
        result, _ = self.put(cache, [1, 2, 3])
        cache.inc_lock_ref(result.node)
        with self.assertRaisesRegex(RadixIntegrityError, "3 locked tokens"):
            cache.reset()
        cache.dec_lock_ref(result.node)
        cache.reset()
        self.assertEqual((self.allocator.available_size(), self.hit(cache, [1, 2, 3])), (64, 0))

    def test_heap_does_not_grow_with_use(self) -> None:
        cache = self.make()
        result, _ = self.put(cache, [1, 2, 3])
        for _ in range(1000):
            cache.inc_lock_ref(result.node)
            cache.dec_lock_ref(result.node)
            self.hit(cache, [1, 2, 3])
        self.assertLess(len(cache._heap), 200)


class TestIntegrityCheck(CacheCase):
    """Each kind of damage is found and named."""

    def damaged(self, damage, message: str, **kwargs) -> None:
        cache = self.make(page_size=2)
        self.put(cache, [1, 2, 3, 4])
        self.put(cache, [1, 2, 5, 6])
        upper = next(iter(cache.root.children.values()))
        lower = next(iter(upper.children.values()))
        check_integrity(cache, held=0)
        damage(cache, upper, lower)
        with self.assertRaisesRegex(RadixIntegrityError, message):
            check_integrity(cache, **{"held": 0, **kwargs})

    def test_damage(self) -> None:
        def set_on(which, name, value):
            return lambda cache, upper, lower: setattr({"u": upper, "l": lower}[which], name, value)

        def take_slot(cache, upper, lower):
            lower.value = upper.value.copy()

        for damage, message in (
            (set_on("l", "parent", None), "as its parent"),
            (set_on("l", "lock_ref", -1), "-1 locks"),
            (set_on("l", "lock_ref", 1), "has 0 locks, its children 1"),
            (set_on("u", "lock_ref", 1), "evictable tokens counted"),
            (set_on("l", "key", np.array([7, 8])), "is filed under"),
            (set_on("l", "key", np.array([3])), "1 tokens and 2 slots"),
            (set_on("l", "value", np.array([5, 6])), "whole pages of 2"),
            (set_on("l", "last_access", 99), "after its parent"),
            (set_on("l", "heap_key", None), "eviction would not find it"),
            (take_slot, "two owners"),
            (lambda cache, upper, lower: setattr(cache, "_evictable", 5), "6 evictable tokens counted"),
            (lambda cache, upper, lower: setattr(cache, "_num_nodes", 4), "counter says 4"),
            (lambda cache, upper, lower: self.allocator.alloc(2), "2 tokens leaked"),
        ):
            with self.subTest(message):
                self.damaged(damage, message)

    def test_arguments(self) -> None:
        nothing = lambda cache, upper, lower: None  # noqa: E731
        freed = lambda *_: setattr(self.allocator, "free_slots", lambda: torch.tensor([2]))  # noqa: E731
        self.damaged(freed, "2x tree|1x tree, 1x free", held=None)
        self.damaged(nothing, "1x tree, 0x free, 1x held by requests", held=torch.tensor([2]))
        self.damaged(nothing, "-2 tokens leaked", held=2)


if __name__ == "__main__":
    unittest.main()
