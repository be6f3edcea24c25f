"""What a request holds in the pools and in the prefix cache, from admission to release."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from sglang.srt.configs.cache_layout import FULL, SWA
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import check_integrity
from sglang.srt.mem_cache.room import Room
from sglang.srt.mem_cache.tree_node import MatchResult


class PoolLeakError(RuntimeError):
    """Slots, rows or states are missing, or have no owner."""


class ReqMemory:
    """Moves slots between the allocator, requests and the prefix tree; every token has exactly one owner."""

    def __init__(
        self,
        allocator: TokenToKVPoolAllocator,
        req_pool: ReqToTokenPool,
        tree: RadixCache,
        step_width: int = 1,
        step_ahead: int = 0,
    ) -> None:
        """A decode step computes ``step_width`` tokens per request; each step needs ``step_ahead`` more slots."""
        if step_width < 1 or step_ahead < 0:
            raise ValueError(f"step_width >= 1 and step_ahead >= 0 must hold, got {step_width} and {step_ahead}")
        self.allocator = allocator
        self.req_pool = req_pool
        self.tree = tree
        self.step_width = step_width
        self.step_ahead = step_ahead
        # A draft layer's row of a token is computed from the token after it too, so both must be the same.
        self._keyed_by_pairs = step_width > 1
        self._limits = [companion for companion in tree.companions if companion.is_limit]
        # If a cached prefix cannot end inside a chunk, chunks end where later requests may need an end.
        self._ends_matter = not all(companion.cuttable for companion in tree.companions)

    @property
    def page_size(self) -> int:
        return self.allocator.page_size

    def room(self) -> Room:
        """What is available now of each unit that can run out, including what eviction can free."""
        room = Room({FULL: self.allocator.available_size() + self.tree.evictable_size()})
        room.update((companion.unit, companion.room()) for companion in self._limits)
        return room

    def needs(self, new_tokens: Sequence[int], running: bool = False) -> Room:
        """Units for ``new_tokens`` more tokens of each request; ``running`` ones already hold what a step needs."""
        needed = Room({FULL: sum(new_tokens)})
        for companion in self._limits:
            needed[companion.unit] = sum(companion.needs(number, running) for number in new_tokens)
        return needed

    def num_used(self, unit: str = FULL) -> int:
        """Tokens of ``unit`` that requests hold: their own slots, and those of prefixes that they lock."""
        return self.num_of(unit) - self.room()[unit]

    def num_of(self, unit: str) -> int:
        """Size of ``unit`` in tokens; 0 if the model does not have it."""
        if unit == FULL:
            return self.allocator.size
        return sum(companion.num_units for companion in self._limits if companion.unit == unit)

    def load(self) -> dict[str, int]:
        """Tokens that requests hold, and the size of the pool; the same for a window with separate pools."""
        found = {"num_used_tokens": self.num_used(), "max_total_num_tokens": self.allocator.size}
        if self.allocator.window is not None:
            found.update(num_used_swa_tokens=self.num_used(SWA), swa_max_total_num_tokens=self.num_of(SWA))
        return found

    def match(self, req: Req) -> MatchResult:
        """The usable cached prefix of a request that holds nothing yet."""
        return self.tree.match_prefix(self._key(req, req.max_prefix_len()))

    def _key(self, req: Req, num_tokens: int) -> np.ndarray:
        """By what the prefix cache knows the first ``num_tokens`` tokens, fewer than the host knows: [n] int64."""
        tokens = req.token_ids
        if not self._keyed_by_pairs:
            return tokens[:num_tokens]
        assert num_tokens < len(tokens), f"{num_tokens} tokens to key by pairs, {len(tokens)} known"
        return tokens[:num_tokens] << 32 | tokens[1 : num_tokens + 1]

    def admit(self, req: Req, match: MatchResult) -> None:
        """Give the request a row, its cached prefix and its companion data; ``match.node`` must be locked for it."""
        for companion in self.tree.companions:
            held = companion.fork(match.node)
            if held is None:
                raise PoolLeakError(f"no {companion.unit} slot for request {req.rid}: live slots cover every request")
            req.held[companion.unit] = held
        row = self.req_pool.alloc()
        if row is None:
            raise PoolLeakError(f"no request row for {req.rid}: rows cover every running request")
        prefix = match.slot_ids.numel()
        if prefix:
            self.req_pool.write(row, 0, match.slot_ids)
        req.req_pool_idx, req.last_node = row, match.node
        req.kv_committed_len = req.kv_allocated_len = req.cache_protected_len = prefix
        # The prefix that a retracted request finds may be its own.
        req.own_start = min(req.own_start, prefix) if req.num_retractions else prefix
        req.state_boundary = match.kv_len if match.kv_len > prefix and self._ends_matter else 0
        req.cached_tokens = req.cached_tokens if req.num_retractions else prefix

    def may_continue(self, req: Req) -> bool:
        """Whether the next chunk of a prompt may be planned before the result of the last one is known.

        Not if a window or state of the request moves on with the result, or its prompt log-probabilities.
        """
        return not self.tree.companions and not req.return_logprob

    def extend(self, reqs: list[Req], ends: list[int]) -> torch.Tensor | None:
        """Write slots for tokens ``kv_committed_len .. end`` to the rows; [N] int64, None if they do not fit."""
        starts = [req.kv_allocated_len for req in reqs]
        assert starts == [req.kv_committed_len for req in reqs], "a prefill step starts where the slots end"
        self._make_room(self.missing_for_extend(reqs, ends))
        upto = self._with_ahead(reqs, ends)
        slots = self.allocator.alloc_extend(starts, upto, [self._last_slot(req) for req in reqs])
        if slots is None:
            return None
        self.req_pool.write_extend([self._row(req) for req in reqs], starts, upto, slots)
        self._flush_window()
        for req, last in zip(reqs, upto, strict=True):
            req.kv_allocated_len = last
        if upto == ends:
            return slots
        spans = zip(slots.split([last - start for start, last in zip(starts, upto, strict=True)]), starts, ends)
        return torch.cat([mine[: end - start] for mine, start, end in spans])

    def _with_ahead(self, reqs: Sequence[Req], ends: Sequence[int]) -> list[int]:
        """The end of the slots that a prefill step needs, per request."""
        return [end + self.step_ahead * (end == req.seq_len) for req, end in zip(reqs, ends, strict=True)]

    def extend_step(self, reqs: list[Req]) -> torch.Tensor | None:
        """Decode: slots from the first position after the committed tokens; None if they do not fit.

        Returns [B * (step_width + step_ahead)] int64, requests one after the other. Slots that earlier steps did not
        use come first. They are written to the host's table only; the step itself writes the device's table.
        """
        width = self.step_width + self.step_ahead
        one_each = width == 1 and all(req.kv_allocated_len == req.kv_committed_len for req in reqs)
        self._make_room(len(reqs) if one_each and self.page_size == 1 else self.missing_for_step(reqs))
        rows = [self._row(req) for req in reqs]
        if one_each:
            positions = [req.kv_committed_len for req in reqs]
            last = [self._last_slot(req) for req in reqs] if self.page_size > 1 else [-1] * len(reqs)
            slots = self.allocator.alloc_decode([position + 1 for position in positions], last)
            if slots is not None:
                self.req_pool.write_decode(rows, positions, slots)
        else:
            slots = self._extend_wide(reqs, rows, width)
        if slots is not None:
            for req in reqs:
                end = req.kv_committed_len + width
                if end > req.kv_allocated_len:
                    req.kv_allocated_len = end
            self._flush_window()
        return slots

    def _flush_window(self) -> None:
        """Copy the window table to the device before a step that reads it is queued."""
        if self.allocator.window is not None:
            self.allocator.window.flush()

    def _extend_wide(self, reqs: list[Req], rows: list[int], width: int) -> torch.Tensor | None:
        starts = [req.kv_allocated_len for req in reqs]
        ends = [max(req.kv_allocated_len, req.kv_committed_len + width) for req in reqs]
        new = self.allocator.alloc_extend(starts, ends, [self._last_slot(req) for req in reqs])
        if new is None:
            return None
        spans = list(zip(rows, starts, ends, strict=True))
        owners = [row for row, start, end in spans for _ in range(start, end)]
        self.req_pool.write_decode(owners, [position for _, start, end in spans for position in range(start, end)], new)
        first = [req.kv_committed_len for req in reqs]
        return torch.cat([self.req_pool.read(row, at, at + width) for row, at in zip(rows, first, strict=True)])

    def missing_for(self, reqs: Sequence[Req], ends: Sequence[int]) -> int:
        """Tokens, in whole pages, that must be allocated so that each request has slots up to its end."""
        page = self.page_size
        spans = zip((req.kv_allocated_len for req in reqs), ends, strict=True)
        return sum(max(0, -(-end // page) - -(-start // page)) for start, end in spans) * page

    def missing_for_extend(self, reqs: Sequence[Req], ends: Sequence[int]) -> int:
        """Tokens, whole pages, that a prefill step of these requests must allocate."""
        return self.missing_for(reqs, self._with_ahead(reqs, ends))

    def missing_for_step(self, reqs: Sequence[Req]) -> int:
        """Tokens, whole pages, that a decode step of these requests must allocate."""
        return self.missing_for(reqs, [req.kv_committed_len + self.step_width + self.step_ahead for req in reqs])

    def with_step(self, new_tokens: int) -> int:
        """Tokens, whole pages, that ``new_tokens`` more of a request and a decode step after them allocate at most."""
        return -(-(new_tokens + self.step_width + self.step_ahead) // self.page_size) * self.page_size

    def advance(self, req: Req) -> None:
        """Free what no later step of a running request needs: these start after all known tokens but one.

        A step in flight does not start earlier either, and only steps after it use what is freed.
        """
        for companion in self._limits:
            read = partial(self.req_pool.read, self._row(req))
            known = min(req.kv_committed_len, req.seq_len - 1)
            companion.advance(req.held[companion.unit], known, req.cache_protected_len, read)

    def share_prefix(self, req: Req) -> None:
        """Insert what a running request has computed into the prefix cache, and lock it for this request.

        If another request has cached the same tokens meanwhile, its slots replace this request's own.
        """
        num_tokens = self.tree.aligned(req.kv_committed_len)
        assert req.last_node is not None
        if self.tree.disable or num_tokens <= req.cache_protected_len or req.last_node.withdrawn:
            return
        row = self._row(req)
        slots = self.req_pool.read(row, 0, num_tokens)
        result = self.tree.insert(self._key(req, num_tokens), slots)
        for companion in self.tree.companions:
            companion.on_insert(result, req.kv_committed_len, req.held[companion.unit])
        if result.prefix_len > req.cache_protected_len:
            self.allocator.free(slots[req.cache_protected_len : result.prefix_len])
            self.req_pool.write(row, 0, self.tree.path_slots(result.node))
        self.tree.inc_lock_ref(result.node)
        self.tree.dec_lock_ref(req.last_node)
        req.last_node, req.cache_protected_len = result.node, num_tokens

    def withdraw(self, req: Req) -> None:
        """Remove from the prefix cache what was computed for a request whose step turned out to be faulty.

        Requests that already use it continue, each checked by its own steps, and cache nothing.
        """
        assert req.last_node is not None
        self.tree.withdraw(req.last_node, req.own_start)

    def release(self, req: Req, cache: bool) -> None:
        """Free all that the request holds; with ``cache`` its computed tokens stay in the prefix cache.

        Not cached are: a token whose step may still be in flight, because it is not known yet to be sound; tokens that
        were computed on a withdrawn prefix; and slots past the committed tokens.
        """
        if req.req_pool_idx is None:
            return
        assert req.last_node is not None
        slots = self.req_pool.read(req.req_pool_idx, 0, req.kv_allocated_len)
        if cache and not req.last_node.withdrawn:
            num_tokens = self.tree.aligned(min(req.kv_committed_len, req.seq_len - 1))
            result = self.tree.insert(self._key(req, num_tokens), slots[:num_tokens])
            surplus = [
                slots[req.cache_protected_len : max(req.cache_protected_len, result.prefix_len)],
                slots[result.cached_len :],
            ]
            self.allocator.free(torch.cat(surplus))
        else:
            self.allocator.free(slots[req.cache_protected_len :])
        self.tree.dec_lock_ref(req.last_node)
        self.req_pool.free(req.req_pool_idx)
        for companion in self.tree.companions:
            companion.release(req.held.pop(companion.unit))
        req.req_pool_idx = req.last_node = None
        req.kv_committed_len = req.kv_allocated_len = req.cache_protected_len = req.state_boundary = 0

    def check_idle(self, deep: bool) -> None:
        """Raise PoolLeakError or RadixIntegrityError unless all is free or cached; ``deep`` recounts the tree."""
        if self.num_used():
            raise PoolLeakError(
                f"idle, but {self.num_used()} of {self.allocator.size} KV tokens are held by no request (free "
                f"{self.allocator.available_size()}, cached {self.tree.total_size()}, of these locked "
                f"{self.tree.protected_size()})"
            )
        if self.req_pool.available_size() != self.req_pool.size:
            raise PoolLeakError(
                f"idle, but {self.req_pool.size - self.req_pool.available_size()} request rows are held"
            )
        for companion in self.tree.companions:
            if held := companion.num_held():
                raise PoolLeakError(f"idle, but {held} {companion.unit} slots are held by no request")
        if deep:
            check_integrity(self.tree, held=0, held_units={})

    def _row(self, req: Req) -> int:
        assert req.req_pool_idx is not None, f"request {req.rid} holds no row"
        return req.req_pool_idx

    def _last_slot(self, req: Req) -> int:
        end = req.kv_allocated_len
        return int(self.req_pool.read(self._row(req), end - 1, end)[0]) if end else -1

    def _make_room(self, num_tokens: int) -> None:
        missing = num_tokens - self.allocator.available_size()
        if missing > 0:
            self.tree.evict(missing)
        for companion in self._limits:
            companion.make_room(num_tokens)
