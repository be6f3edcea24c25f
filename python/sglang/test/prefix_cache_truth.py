"""A slow prefix cache made of a dictionary, and a random server that compares the fast one with it step by step."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang.srt.configs.cache_layout import STATE
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import StateSlots
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import check_integrity
from sglang.srt.mem_cache.state_companion import StateCompanion
from sglang.srt.mem_cache.tree_node import MatchResult, TreeNode
from sglang.test.cache_pools import state_slots
from sglang.test.test_utils import CustomTestCase

Prefix = tuple[int, ...]


@dataclass
class Page:
    """One page of one cached prefix; ``ends_node`` where the radix tree must have cut an edge."""

    slots: list[int]
    tick: int = 0
    locks: int = 0
    ends_node: bool = False


class PrefixTruth:
    """Every cached prefix of whole pages by its tokens; nothing is shared."""

    def __init__(self, page_size: int, hybrid: bool):
        self.page_size = page_size
        self.hybrid = hybrid
        self.pages: dict[Prefix, Page] = {}
        self.states: list[Prefix] = []  # least recently used first
        self.clock = 0

    def known(self, tokens: list[int]) -> list[Prefix]:
        """The cached prefixes of ``tokens``, shortest first."""
        found = []
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            if tuple(tokens[:end]) not in self.pages:
                break
            found.append(tuple(tokens[:end]))
        return found

    def _touch(self, prefixes: list[Prefix]) -> None:
        self.clock += 1
        for prefix in prefixes:
            self.pages[prefix].tick = self.clock

    def _slots(self, prefixes: list[Prefix]) -> list[int]:
        return [slot for prefix in prefixes for slot in self.pages[prefix].slots]

    def match(self, tokens: list[int]) -> tuple[Prefix, list[int], int]:
        """The usable prefix, its slots, and how many tokens KV alone matches."""
        found = self.known(tokens)
        kv_len = len(found) * self.page_size
        if self.hybrid:
            while found and found[-1] not in self.states:
                found.pop()
            if found:
                self.use_state(found[-1])
        elif found:
            self.pages[found[-1]].ends_node = True
        if found or not self.hybrid:
            self._touch(found)
        return (found[-1] if found else ()), self._slots(found), kv_len

    def insert(self, tokens: list[int], slots: list[int]) -> int:
        """Returns how many tokens were there before."""
        found = self.known(tokens)
        if found:
            self.pages[found[-1]].ends_node = True
        before = len(found) * self.page_size
        for end in range(before + self.page_size, len(tokens) + 1, self.page_size):
            self.pages[tuple(tokens[:end])] = Page(slots[end - self.page_size : end])
        found = self.known(tokens)
        if found:
            self.pages[found[-1]].ends_node = True
        self._touch(found)
        return before

    def use_state(self, prefix: Prefix) -> None:
        if prefix in self.states:
            self.states.remove(prefix)
        self.states.append(prefix)

    def lock(self, prefix: Prefix, by: int) -> None:
        for end in range(self.page_size, len(prefix) + 1, self.page_size):
            self.pages[prefix[:end]].locks += by

    def evict(self, num_tokens: int) -> int:
        freed = 0
        while freed < num_tokens:
            parents = {prefix[: -self.page_size] for prefix in self.pages}
            leaves = [p for p, page in self.pages.items() if p not in parents and not page.locks]
            if not leaves:
                break
            prefix = min(leaves, key=lambda p: (self.hybrid and p in self.states, self.pages[p].tick))
            while True:
                del self.pages[prefix]
                freed += self.page_size
                if prefix in self.states:
                    self.states.remove(prefix)
                prefix = prefix[: -self.page_size]
                if not prefix or self.pages[prefix].ends_node:
                    break
        return freed

    def evictable(self) -> int:
        return sum(self.page_size for page in self.pages.values() if not page.locks)


@dataclass
class FakeRequest:
    """A request of the random server: ``slots`` cover the tokens already computed, the first ``owned`` by the tree."""

    tokens: list[int]
    match: MatchResult
    prefix: Prefix
    slots: list[int]
    owned: int
    live_state: int | None = None
    node: TreeNode = field(init=False)

    def __post_init__(self) -> None:
        self.node = self.match.node


def state_of(tokens: Prefix) -> float:
    """A number in place of the recurrent state after ``tokens``; 0 for none, as a fresh slot."""
    return float(hash(tokens) % 1_000_003 + 1) if tokens else 0.0


class RandomServer:
    """Serves random requests over a prefix cache and its truth, and compares everything after every step.

    Asserts with ``case`` (a unittest case). Tokens come from an alphabet of three, so that prefixes meet often.
    """

    def __init__(self, case, *, seed: int, page_size: int, num_pages: int, num_states: int = 0, max_tokens: int = 40):
        self.case = case
        self.rng = random.Random(seed)
        self.page_size = page_size
        self.max_tokens = max_tokens
        self.allocator = TokenToKVPoolAllocator(num_pages * page_size, page_size)
        self.states: StateSlots | None = None
        self.kept: StateCompanion | None = None
        companions: list[StateCompanion] = []
        if num_states:
            self.states, pool = state_slots(num_states, [0, 3], (2, 2), (1, 3, 2), torch.float64, torch.float64)
            self.state_tensors = [tensor for layer in (0, 3) for tensor in pool.layer(layer)]
            self.kept = StateCompanion(self.states)
            companions = [self.kept]
        self.cache = RadixCache(self.allocator, page_size, companions=companions)
        self.truth = PrefixTruth(page_size, hybrid=bool(num_states))
        self.running: list[FakeRequest] = []
        self.history: list[list[int]] = [[]]
        self.counts: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        actions = [self.admit] * 3 + [self.prefill] * 8 + [self.finish] * 2 + [self.abort, self.probe, self.evict]
        if self.states:
            actions += [self.evict_states, self.hold_state]
        for _ in range(steps):
            action = self.rng.choice(actions)
            action()
            self.compare()
        while self.running:
            self.finish()
            self.compare()
        self.cache.reset()
        self.case.assertEqual(self.allocator.available_size(), self.allocator.size)
        if self.states:
            self.case.assertEqual(self.states.available_size(), self.states.size)

    def _random_tokens(self) -> list[int]:
        base = self.rng.choice(self.history)
        start = base[: self.rng.randint(0, min(len(base), self.max_tokens))]
        extra = [self.rng.randint(0, 2) for _ in range(self.rng.randint(0, self.max_tokens - len(start)))]
        return start + extra

    def _match(self, tokens: list[int]) -> tuple[MatchResult, Prefix]:
        prefix, slots, kv_len = self.truth.match(tokens)
        got = self.cache.match_prefix(tokens)
        self.case.assertEqual(got.slot_ids.tolist(), slots)
        self.case.assertEqual(got.kv_len, kv_len)
        self.case.assertEqual(got.slot_ids.dtype, torch.int64)
        if self.kept:
            slot = self.kept._kept.get(got.node)
            self.case.assertEqual(slot is None, not prefix)
            if slot is not None:
                self._expect_state(slot, prefix)
        if slots:
            self.counts["hit"] += 1
        if kv_len > len(slots):
            self.counts["kv beyond state"] += 1
        return got, prefix

    def _expect_state(self, slot: int, prefix: Prefix) -> None:
        assert self.states is not None
        for tensor in self.state_tensors:
            self.case.assertTrue(bool((tensor[slot] == state_of(prefix)).all()), f"state of {prefix} is wrong")

    def probe(self) -> None:
        self._match(self._random_tokens())

    def admit(self) -> None:
        if len(self.running) >= 4:
            return
        tokens = self._random_tokens() + [self.rng.randint(0, 2)]
        match, prefix = self._match(tokens[:-1])
        req = FakeRequest(tokens, match, prefix, match.slot_ids.tolist(), len(prefix))
        if self.states and not self._fork(req):
            return
        self.cache.inc_lock_ref(match.node)
        self.truth.lock(prefix, +1)
        self.running.append(req)
        self.history.append(tokens)

    def _fork(self, req: FakeRequest) -> bool:
        assert self.states is not None and self.kept is not None
        live = sum(r.live_state is not None for r in self.running)
        handed_over = False
        if self.states.size - live - len(self.truth.states) == 0:
            others = [p for p in self.truth.states if p != req.prefix]
            handed_over = not others and bool(req.prefix)
            if others:
                self.truth.states.remove(others[0])
                self.counts["state evicted for a request"] += 1
        slot = self.kept.fork(req.match.node)
        if live == self.states.size:
            self.case.assertIsNone(slot)
            return False
        self.case.assertIsNotNone(slot, "a live slot must be available while requests hold fewer than all")
        if handed_over:
            self.truth.states.remove(req.prefix)
            self.counts["state handed over"] += 1
        assert slot is not None
        self._expect_state(slot, req.prefix)
        req.live_state = slot
        return True

    def _alloc(self, start: int, end: int, last: int) -> torch.Tensor | None:
        slots = self.allocator.alloc_extend([start], [end], [last])
        if slots is None:
            want = self.rng.choice([1, end - start, end - start + self.page_size])
            self.case.assertEqual(self.cache.evict(want), self.truth.evict(want))
            self.counts["evicted for memory"] += 1
            slots = self.allocator.alloc_extend([start], [end], [last])
        return slots

    def prefill(self) -> None:
        if not self.running:
            return
        req = self.rng.choice(self.running)
        done = len(req.slots)
        if done == len(req.tokens):
            req.tokens.append(self.rng.randint(0, 2))  # a decode step
        end = self.rng.randint(done + 1, len(req.tokens))
        if self.rng.random() < 0.5:
            end = max(self.cache.aligned(end), done + 1)
        new = self._alloc(done, end, req.slots[-1] if req.slots else -1)
        if new is None:
            self.counts["retracted"] += 1
            self._drop(req)
            return
        req.slots += new.tolist()
        if self.states:
            assert req.live_state is not None
            for tensor in self.state_tensors:
                tensor[req.live_state] = state_of(tuple(req.tokens[:end]))
        if self.rng.random() < 0.7:
            self._cache_unfinished(req)

    def _insert(self, req: FakeRequest, with_state: bool):
        """Insert what is computed, free the duplicates, and check the report."""
        done = len(req.slots)
        tokens = req.tokens[:done]
        whole = tuple(tokens[: self.cache.aligned(done)])
        expected = self.truth.insert(tokens, req.slots)
        if with_state and self.states:
            self._expect_snapshot(whole, done)
        result = self.cache.insert(tokens, torch.tensor(req.slots, dtype=torch.int64))
        if with_state and self.kept:
            assert req.live_state is not None
            self.kept.on_insert(result, done, req.live_state)
        self.case.assertEqual((result.prefix_len, result.cached_len), (expected, len(whole)))
        if expected > req.owned:
            self.counts["duplicates"] += 1
        self.allocator.free(torch.tensor(req.slots[req.owned : expected], dtype=torch.int64))
        slots = self.cache.path_slots(result.node).tolist()
        self.case.assertEqual(slots, self.truth._slots(self.truth.known(list(whole))))
        return result, whole, slots

    def _expect_snapshot(self, whole: Prefix, done: int) -> None:
        """Give the reference the state that a snapshot will have."""
        assert self.states is not None
        if len(whole) != done or not whole:
            return
        if whole in self.truth.states:
            self.truth.use_state(whole)
            return
        live = sum(r.live_state is not None for r in self.running)
        if self.states.size - live - len(self.truth.states) == 0:
            if not self.truth.states:
                self.counts["no state available"] += 1
                return
            self.truth.states.pop(0)
        self.truth.use_state(whole)
        self.counts["snapshot"] += 1

    def _cache_unfinished(self, req: FakeRequest) -> None:
        result, whole, slots = self._insert(req, with_state=True)
        req.slots = slots + req.slots[len(whole) :]
        self.cache.inc_lock_ref(result.node)
        self.cache.dec_lock_ref(req.node)
        self.truth.lock(whole, +1)
        self.truth.lock(req.prefix, -1)
        req.node, req.prefix, req.owned = result.node, whole, len(whole)

    def finish(self) -> None:
        if not self.running:
            return
        req = self.rng.choice(self.running)
        _, whole, _ = self._insert(req, with_state=False)
        self.allocator.free(torch.tensor(req.slots[len(whole) :], dtype=torch.int64))
        self._leave(req)

    def abort(self) -> None:
        if self.running:
            self._drop(self.rng.choice(self.running))

    def _drop(self, req: FakeRequest) -> None:
        self.allocator.free(torch.tensor(req.slots[req.owned :], dtype=torch.int64))
        self._leave(req)

    def _leave(self, req: FakeRequest) -> None:
        self.cache.dec_lock_ref(req.node)
        self.truth.lock(req.prefix, -1)
        if self.states and req.live_state is not None:
            self.states.free(req.live_state)
        self.running.remove(req)

    def evict(self) -> None:
        want = self.rng.randint(0, 3 * self.page_size)
        self.case.assertEqual(self.cache.evict(want), self.truth.evict(want))

    def evict_states(self) -> None:
        assert self.kept is not None
        want = self.rng.randint(0, 2)
        expected = min(want, len(self.truth.states))
        self.case.assertEqual(self.kept.evict(want), expected)
        del self.truth.states[:expected]

    def hold_state(self) -> None:
        """While one state is kept and its KV locked, all others can go."""
        assert self.kept is not None
        match, prefix = self._match(self._random_tokens())
        slot = self.kept._kept.get(match.node)
        if slot is None:
            return
        self.cache.inc_lock_ref(match.node)
        self.truth.lock(prefix, +1)
        self.case.assertEqual(self.kept.evict(99, keep=match.node), len(self.truth.states) - 1)
        self.truth.states = [prefix]
        self.case.assertEqual(self.cache.evict(2 * self.page_size), self.truth.evict(2 * self.page_size))
        self._expect_state(slot, prefix)
        self.cache.dec_lock_ref(match.node)
        self.truth.lock(prefix, -1)
        self.counts["state held"] += 1

    def compare(self) -> None:
        """Check the tree, page by page, and all counters."""
        held = [slot for req in self.running for slot in req.slots[req.owned :]]
        held_slots = torch.tensor(held, dtype=torch.int64)
        live = [req.live_state for req in self.running if req.live_state is not None]
        check_integrity(self.cache, held=held_slots, held_units={STATE: live})
        if self.kept:
            self.case.assertEqual(len(self.kept._kept), len(self.truth.states))
        self.case.assertEqual(self.cache.evictable_size(), self.truth.evictable())
        self.case.assertEqual(self.cache.total_size(), len(self.truth.pages) * self.page_size)
        seen: dict[Prefix, tuple[list[int], int, bool]] = {}
        self._dump(self.cache.root, (), seen)
        expected = {
            prefix: (page.slots, page.locks, prefix in self.truth.states) for prefix, page in self.truth.pages.items()
        }
        self.case.assertEqual(seen, expected)

    def _dump(self, node, above: Prefix, seen: dict[Prefix, tuple[list[int], int, bool]]) -> None:
        size = self.page_size
        for child in node.children.values():
            for end in range(size, child.key.size + 1, size):
                state = self.kept is not None and self.kept._kept.get(child) is not None and end == child.key.size
                prefix = above + tuple(child.key[:end].tolist())
                seen[prefix] = (np.asarray(child.value[end - size : end]).tolist(), child.lock_ref, state)
            self._dump(child, above + tuple(child.key.tolist()), seen)


class RandomServing(CustomTestCase):
    """Random servers over pages of three sizes, one for each of ``num_states``.

    Together they must show each of ``events`` more than ``least`` times.
    """

    num_states: tuple[int, ...]
    events: tuple[str, ...]
    least: int

    def serve(self, **sizes: int) -> None:
        counts: Counter[str] = Counter()
        for seed, num_states in enumerate(self.num_states):
            server = RandomServer(self, seed=seed, num_states=num_states, **sizes)
            server.run(1500)
            counts += server.counts
        for event in self.events:
            self.assertGreater(counts[event], self.least, f"the simulation never exercised: {event}")

    def test_page_1(self) -> None:
        self.serve(page_size=1, num_pages=90, max_tokens=40)

    def test_page_2(self) -> None:
        self.serve(page_size=2, num_pages=60, max_tokens=40)

    def test_page_16(self) -> None:
        self.serve(page_size=16, num_pages=14, max_tokens=100)
