"""Windows in the prefix tree against a list of pages, and the table from full pages to window pages."""

from __future__ import annotations

import random
import unittest

import numpy as np
import torch

from sglang.srt.configs.cache_layout import SWA, TOMBSTONE_PAGE, WINDOW_DUMMY_PAGES
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import RadixIntegrityError, check_integrity
from sglang.srt.mem_cache.slot_list import SlotAccountingError
from sglang.srt.mem_cache.window_companion import WindowCompanion, WindowHold
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

PAGE = 2
Prefix = tuple[int, ...]


class WindowServer:
    """Computes random sequences over a tree with windows, next to a list of what must be there.

    known: prefixes of whole pages that are cached; ``unlocked`` those whose windows can go, in this order.
    """

    def __init__(self, case: unittest.TestCase, seed: int, num_pages: int = 60, num_windows: int = 24) -> None:
        self.case, self.rng = case, random.Random(seed)
        self.window = WindowPages(num_pages, num_windows, PAGE)
        self.allocator = TokenToKVPoolAllocator(num_pages * PAGE, PAGE, self.window)
        self.kept = WindowCompanion(self.window)
        self.cache = RadixCache(self.allocator, PAGE, companions=[self.kept])
        self.known: set[Prefix] = set()
        self.unlocked: list[Prefix] = []
        self.locked: list[tuple[Prefix, WindowHold, object]] = []
        self.counts = dict.fromkeys(("hit", "hit before a tombstone", "tombstone", "revived", "locked", "full"), 0)

    def prefixes(self, tokens: list[int]) -> list[Prefix]:
        """Whole pages, shortest first."""
        return [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]

    def alive(self) -> set[Prefix]:
        return {*self.unlocked, *(prefix for prefix, _, _ in self.locked)}

    def use(self, prefix: Prefix) -> None:
        if prefix in self.unlocked:
            self.unlocked.remove(prefix)
            self.unlocked.append(prefix)

    def match(self, tokens: list[int]):
        known = 0
        while known < len(self.prefixes(tokens)) and self.prefixes(tokens)[known] in self.known:
            known += 1
        usable = [prefix for prefix in self.prefixes(tokens)[:known] if prefix in self.alive()]
        wanted = usable[-1] if usable else ()
        found = self.cache.match_prefix(tokens)
        self.case.assertEqual((found.slot_ids.numel(), found.kv_len), (len(wanted), known * PAGE))
        self.use(wanted)
        self.counts["hit"] += bool(wanted)
        self.counts["hit before a tombstone"] += 0 < len(wanted) < known * PAGE
        return found, wanted

    def tokens(self) -> list[int]:
        return [self.rng.randint(0, 1) for _ in range(self.rng.randint(1, 16))]

    def compute(self) -> None:
        """Add to the cache what it lacks of a random sequence."""
        tokens = self.tokens()
        found, prefix = self.match(tokens)
        held, start = self.kept.fork(found.node), len(prefix)
        self.cache.inc_lock_ref(found.node)
        if prefix in self.unlocked:
            self.unlocked.remove(prefix)
        last = int(found.slot_ids[-1]) if start else -1
        missing = -(-len(tokens) // PAGE) - start // PAGE
        self.make_room(missing, prefix)
        new = self.allocator.alloc_extend([start], [len(tokens)], [last])
        if new is not None:
            slots = torch.cat([found.slot_ids, new])
            whole = len(tokens) // PAGE * PAGE
            result = self.cache.insert(tokens, slots)
            ends = self.cached()[1]
            for each in self.prefixes(tokens)[start // PAGE :]:
                self.counts["revived"] += each in self.known and each not in self.alive()
                if each not in self.alive():
                    # First goes what is inside of a node.
                    self.unlocked.insert(len(self.unlocked) if each in ends else 0, each)
            self.known |= set(self.prefixes(tokens))
            self.allocator.free(torch.cat([slots[start : result.prefix_len], slots[max(whole, start) :]]))
        self.cache.dec_lock_ref(found.node)
        self.kept.release(held)
        if prefix and all(prefix != other for other, _, _ in self.locked):
            self.unlocked.append(prefix)

    def make_room(self, num_pages: int, keep: Prefix) -> None:
        missing = num_pages * PAGE - self.allocator.available_size()
        if missing > 0:
            self.cache.evict(missing)
            self.counts["full"] += 1
            self.forget()
        self.evict(num_pages - self.window.num_free())

    def cached(self) -> tuple[set[Prefix], set[Prefix]]:
        """All prefixes of the tree, and those that end nodes."""
        there: set[Prefix] = set()
        ends: set[Prefix] = set()
        stack = [(self.cache.root, ())]
        while stack:
            node, above = stack.pop()
            for child in node.children.values():
                tokens = [*above, *child.key.tolist()]
                there |= {prefix for prefix in self.prefixes(tokens) if len(prefix) > len(above)}
                ends.add(tuple(tokens))
                stack.append((child, tuple(tokens)))
        return there, ends

    def forget(self) -> None:
        """The tree has evicted whole branches; this test does not check which."""
        there = self.cached()[0]
        self.case.assertLessEqual(there, self.known)
        self.known = there
        self.unlocked = [prefix for prefix in self.unlocked if prefix in there]

    def evict(self, num_pages: int) -> None:
        count = max(0, min(num_pages, len(self.unlocked)))
        self.case.assertEqual(self.kept.evict(num_pages), count)
        del self.unlocked[:count]
        self.counts["tombstone"] += count

    def lock(self) -> None:
        """A request begins, or one ends."""
        if len(self.locked) > 2:
            prefix, held, node = self.locked.pop(self.rng.randrange(len(self.locked)))
            self.cache.dec_lock_ref(node)
            self.kept.release(held)
            if prefix and all(prefix != other for other, _, _ in self.locked):
                self.unlocked.append(prefix)
            return
        found, prefix = self.match(self.tokens())
        self.cache.inc_lock_ref(found.node)
        self.locked.append((prefix, self.kept.fork(found.node), found.node))
        if prefix in self.unlocked:
            self.unlocked.remove(prefix)
        self.counts["locked"] += bool(prefix)

    def run(self, steps: int) -> None:
        actions = [self.compute] * 4 + [self.lock, lambda: self.evict(self.rng.randint(0, 3))]
        for _ in range(steps):
            self.rng.choice(actions)()
            check_integrity(self.cache, held_units={SWA: [held for _, held, _ in self.locked] or [WindowHold()]})
            alive = sum(bool(prefix) for prefix in self.alive())
            self.case.assertEqual(self.window.num_pages - self.window.num_free(), alive)
            self.case.assertEqual(self.kept.room(), (self.window.num_free() + len(self.unlocked)) * PAGE)
        while self.locked:
            _, held, node = self.locked.pop()
            self.cache.dec_lock_ref(node)
            self.kept.release(held)
        self.case.assertEqual(self.kept.num_held(), 0)
        check_integrity(self.cache, held=0, held_units={})
        self.cache.reset()
        self.case.assertEqual(self.window.num_free(), self.window.num_pages)


class TestAgainstList(CustomTestCase):
    def test_random_sequences(self) -> None:
        counts: dict[str, int] = {}
        for seed in range(12):
            server = WindowServer(self, seed)
            server.run(150)
            counts = {name: counts.get(name, 0) + count for name, count in server.counts.items()}
        self.assertGreater(min(counts.values()), 20, counts)


class TestWindowCompanion(CustomTestCase):
    def setUp(self) -> None:
        self.server = WindowServer(self, 0, num_pages=20, num_windows=12)
        self.window, self.kept, self.cache = self.server.window, self.server.kept, self.server.cache

    def put(self, tokens: list[int]) -> torch.Tensor:
        slots = self.server.allocator.alloc(len(tokens))
        self.cache.insert(tokens, slots)
        return slots

    def test_a_prefix_ends_inside_what_was_computed_at_once(self) -> None:
        """If windows run out, inner pages are evicted first, and the last page of all is last."""
        for evicted, lens in enumerate(((2, 4, 6), (2, 2, 6), (0, 0, 6), (0, 0, 0))):
            self.setUp()
            slots = self.put([1, 2, 3, 4, 5, 6])
            self.assertEqual(self.kept.evict(evicted), evicted)
            for tokens, length in zip(([1, 2, 9, 9], [1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 5, 6]), lens, strict=True):
                self.assertEqual(self.cache.match_prefix(tokens).slot_ids.tolist(), slots[:length].tolist())
            check_integrity(self.cache, held=0, held_units={})

    def test_the_same_tokens_bring_a_tombstone_back(self) -> None:
        first = self.put([1, 2, 3, 4])
        self.kept.evict(2)
        again = self.put([1, 2, 3, 4])
        self.server.allocator.free(again)
        self.assertEqual(self.cache.match_prefix([1, 2, 3, 4]).slot_ids.tolist(), first.tolist())
        self.assertEqual(self.window.num_free(), 10)
        check_integrity(self.cache, held=0, held_units={})

    def test_what_a_request_passes_by_is_given_back_and_what_it_reads_is_not(self) -> None:
        self.put([1, 2, 3, 4])
        held = self.kept.fork(self.cache.match_prefix([1, 2, 3, 4]).node)
        self.assertEqual(self.kept.evict(9), 1, "the last page is read")
        slots = self.server.allocator.alloc(8)  # positions 4 to 11
        read = lambda start, end: slots[start - 4 : end - 4]  # noqa: E731
        for known, free, locked in ((4, 7, True), (5, 7, True), (6, 7, False), (7, 7, False), (8, 8, False)):
            self.kept.advance(held, known, 4, read)
            self.assertEqual((self.window.num_free(), bool(held.locked)), (free, locked), f"{known} tokens are known")
        self.assertEqual(self.window.are_live(np.arange(3, 7)).tolist(), [False, True, True, True])
        self.assertEqual((self.kept.needs(100, False), self.kept.needs(100, True), self.kept.needs(1, True)), (6, 2, 1))
        self.server.allocator.free(slots)
        self.kept.release(held)
        check_integrity(self.cache, held=0, held_units={})

    def test_a_leaf_without_windows_goes_first(self) -> None:
        self.put([1, 1])
        self.put([2, 2])
        self.cache.match_prefix([1, 1])
        self.kept.evict(1)  # [2, 2]
        self.put([3, 3])
        self.cache.match_prefix([1, 1])
        self.cache.evict(1)
        self.assertEqual([self.cache.match_prefix([t, t]).kv_len for t in (1, 2, 3)], [2, 0, 2])

    def test_a_cut_leaf_whose_windows_are_the_upper_parts_goes_first(self) -> None:
        slots = self.put([4, 4, 5, 5])
        self.kept._unlocked.move_to_end(int(slots[0]) // PAGE)
        self.kept.evict(1)
        self.put([4, 4, 6, 6])
        check_integrity(self.cache)
        self.cache.evict(1)
        self.assertEqual([self.cache.match_prefix([4, 4, t, t]).kv_len for t in (5, 6)], [2, 4])

    def test_reading_a_page_that_is_gone_is_refused(self) -> None:
        self.put([1, 1])
        node = self.cache.match_prefix([1, 1]).node
        self.kept.evict(1)
        with self.assertRaisesRegex(RadixIntegrityError, "is needed but no longer exists"):
            self.kept.fork(node)

    def test_integrity_check_finds_damage(self) -> None:
        def check(message: str, held: tuple[WindowHold, ...] = ()) -> None:
            with self.assertRaisesRegex(RadixIntegrityError, message):
                self.kept.check(self.cache.nodes(), held)

        self.put([1, 1])
        check("requests read the windows of {1: 1}, locked are {}", (WindowHold(locked=1),))
        self.kept._unlocked.clear()
        check("1 window pages are kept: 0 locks, 0 can be evicted")
        self.kept._unlocked[1] = None
        own = self.server.allocator.alloc(PAGE)
        check("1 window pages leaked")
        self.window._set(2, 2)
        check("2 pages have 1 window pages")
        self.window._set(2, 3)
        self.server.allocator.free(own)
        self.window._set(1, TOMBSTONE_PAGE)
        check("0 pages have 0 window pages, 11 are free, and there are 12")
        self.window._pages.free(2)
        check(r"books differ at pages \[1\]")


class TestWindowPages(CustomTestCase):
    def test_lend_take_back_and_move(self) -> None:
        window = WindowPages(6, 3, PAGE)
        window.lend([4, 1])
        self.assertEqual(window.table.tolist(), [0, 3, 1, 1, 2, 1, 1])
        window.move(4, 6)
        self.assertEqual(window.lent(), {1: 3, 6: 2})
        self.assertEqual(window.take_back(np.array([4, 6, 1])), 2)
        self.assertEqual((window.num_free(), window.lent()), (3, {}))
        window.lend([2, 3, 5])
        self.assertEqual([window.lent()[page] for page in (2, 3, 5)], [2, 3, 4])
        for wrong in (lambda: window.lend([1]), lambda: window.lend([2]), lambda: window.lend([0])):
            self.assertRaises(SlotAccountingError, wrong)
        for source, target in ((2, 3), (1, 4)):
            self.assertRaises(SlotAccountingError, window.move, source, target)
        self.assertRaises(ValueError, WindowPages, 4, 0, PAGE)

    def test_a_table_of_the_devices_own_is_as_it_was_flushed(self) -> None:
        window = WindowPages(6, 3, PAGE)
        window._is_shared, window.table = False, window.table.clone()
        window.lend([2, 5])
        self.assertEqual(window.table.tolist(), [0] + [TOMBSTONE_PAGE] * 6)
        window.flush()
        self.assertEqual(window.table.tolist(), [0, 1, 2, 1, 1, 3, 1])
        window.take_back(np.array([2]))
        window.clear()
        self.assertEqual(window.table.tolist(), [0] + [TOMBSTONE_PAGE] * 6)
        window.flush()

    def test_pages_and_windows_run_out_apart(self) -> None:
        window = WindowPages(4, 3, PAGE)
        allocator = TokenToKVPoolAllocator(4 * PAGE, PAGE, window)
        self.assertIsNone(allocator.alloc(4 * PAGE))
        slots = allocator.alloc(3 * PAGE)
        self.assertEqual((allocator.available_size(), window.num_free()), (PAGE, 0))
        self.assertIsNone(allocator.alloc_decode([1], [-1]))
        window.take_back(np.array([1, 2]))
        self.assertEqual(allocator.alloc_extend([0], [1], [-1]).tolist(), [4 * PAGE])
        allocator.free(slots)
        self.assertEqual(window.lent(), {4: WINDOW_DUMMY_PAGES})
        allocator.clear()
        self.assertEqual(window.num_free(), 3)


if __name__ == "__main__":
    unittest.main()
