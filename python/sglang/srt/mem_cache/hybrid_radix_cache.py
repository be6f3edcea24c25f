"""A radix tree that also owns recurrent states, for models whose prefixes are KV slots plus one state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import StateSlots
from sglang.srt.mem_cache.radix_cache import HeapKey, InsertResult, MatchResult, RadixCache, TreeNode
from sglang.srt.mem_cache.radix_integrity import RadixIntegrityError


class HybridRadixCache(RadixCache):
    """Prefix cache for hybrid models: a prefix can be used up to the deepest node that has a state.

    KV can be cut at any page, a state cannot: a split makes an upper node without state, and a node whose state was
    evicted stays as a tombstone, its KV a hint that a snapshot there would be of use. States in the tree sit in their
    own slots of ``state_pool``, are never written again, and are evicted least recently used first. Leaves without a
    state are the first KV to go.
    """

    def __init__(
        self,
        allocator: TokenToKVPoolAllocator,
        page_size: int,
        state_pool: StateSlots,
        eviction_policy: str = "lru",
        disable: bool = False,
    ):
        self.state_pool = state_pool
        self._state_lru: OrderedDict[TreeNode, None] = OrderedDict()
        super().__init__(allocator, page_size, eviction_policy, disable)

    def num_states(self) -> int:
        """State slots that the tree owns."""
        return len(self._state_lru)

    # Lookup and insertion

    def match_prefix(self, token_ids: Sequence[int] | np.ndarray) -> MatchResult:
        """The longest cached prefix that ends in a state, with that state's slot; marks both as used.

        ``kv_len`` tells how far KV alone matched. Nothing is split: a usable prefix always ends at a node. The state
        slot is the tree's: copy it (``fork_state``) before anything is evicted, and never write to it.
        """
        path, kv_len, inside = self._walk(self._as_key(token_ids))
        if inside:
            path.pop()
        while path and path[-1].state_slot is None:
            path.pop()
        if not path:
            return MatchResult(self._join([]), self.root, None, kv_len)
        self._touch(path)
        self._state_lru.move_to_end(path[-1])
        return MatchResult(self._join([node.value for node in path]), path[-1], path[-1].state_slot, kv_len)

    def snapshot(
        self, token_ids: Sequence[int] | np.ndarray, slot_ids: torch.Tensor | np.ndarray, live_state_slot: int
    ) -> InsertResult:
        """Cache a prefill chunk's end: its KV, and a copy of the live state in a slot of the tree's own.

        ``live_state_slot`` holds the state after exactly ``token_ids`` and stays the caller's. The KV is cached without
        a new state when the tokens are not whole pages, when the node has a state already (which then counts as used),
        or when no state slot can be had even by evicting.
        """
        result = self.insert(token_ids, slot_ids)
        node = result.node
        if result.cached_len != len(token_ids) or node is self.root:
            return result
        if node.state_slot is not None:
            self._state_lru.move_to_end(node)
            return result
        state_slot = self._alloc_state(zero=False)
        if state_slot is not None:
            self.state_pool.copy(live_state_slot, state_slot)
            node.state_slot = state_slot
            self._state_lru[node] = None
        return result

    def fork_state(self, match: MatchResult) -> int | None:
        """A live state slot that starts from a match: a copy of its state, or zero where nothing matched.

        Evicts states of the tree when the pool is dry, the one matched last of all: it is then handed over uncopied.
        So None means that requests hold every slot.
        """
        node = match.node
        if match.state_slot is None:
            return self._alloc_state(zero=True)
        if node.state_slot != match.state_slot:
            raise RadixIntegrityError(f"the state of node {node.id} was evicted between match and copy")
        slot = self._alloc_state(zero=False, keep=node)
        if slot is None:
            return self._detach(node)
        self.state_pool.copy(match.state_slot, slot)
        return slot

    def _alloc_state(self, zero: bool, keep: TreeNode | None = None) -> int | None:
        if not self.state_pool.available_size():
            self.evict_states(1, keep)
        return self.state_pool.alloc(zero=zero)

    def evict_states(self, num_states: int, keep: TreeNode | None = None) -> int:
        """Free up to ``num_states`` states, least recently used first, and not that of ``keep``; returns how many.

        The KV stays, and a lock keeps the KV alone.
        """
        victims = list(islice((node for node in self._state_lru if node is not keep), num_states))
        for node in victims:
            self.state_pool.free(self._detach(node))
        return len(victims)

    def _detach(self, node: TreeNode) -> int:
        """Take the state off a node that stays in the tree, as a tombstone."""
        slot = node.state_slot
        assert slot is not None
        del self._state_lru[node]
        node.state_slot = None
        self._offer(node)
        return slot

    def _withdraw_one(self, node: TreeNode) -> None:
        if node.state_slot is not None:
            self.state_pool.free(self._detach(node))
        super()._withdraw_one(node)

    def _eviction_key(self, node: TreeNode) -> HeapKey:
        """Leaves without a state match nothing, so they go first."""
        return (0 if node.state_slot is None else 1, node.last_access, node.id)

    def _release(self, nodes: list[TreeNode]) -> None:
        super()._release(nodes)
        for node in nodes:
            if node.state_slot is not None:
                del self._state_lru[node]
                self.state_pool.free(node.state_slot)
                node.state_slot = None

    def check_integrity(
        self,
        free_slots: torch.Tensor | None = None,
        held: torch.Tensor | int | None = None,
        held_states: Sequence[int] | None = None,
    ) -> None:
        """As ``RadixCache.check_integrity``, and the same for states.

        ``held_states`` are the slots that requests own; with it, free + tree + held must be the whole state pool.
        """
        super().check_integrity(free_slots, held)
        owner: dict[int, str] = {}
        for node in self._nodes():
            if (node.state_slot is not None) != (node in self._state_lru):
                raise RadixIntegrityError(
                    f"node {node.id} with state {node.state_slot} and the state LRU list disagree"
                )
            if node.state_slot is not None:
                self._claim(owner, node.state_slot, f"node {node.id}")
        if len(owner) != len(self._state_lru):
            raise RadixIntegrityError(f"the tree has {len(owner)} states, its LRU list {len(self._state_lru)}")
        if held_states is None:
            return
        for slot in held_states:
            self._claim(owner, slot, "a request")
        total = len(owner) + self.state_pool.available_size()
        if total != self.state_pool.size:
            raise RadixIntegrityError(
                f"free {self.state_pool.available_size()} + tree {len(self._state_lru)} + held {len(held_states)} = "
                f"{total} states, the pool has {self.state_pool.size}: {self.state_pool.size - total} leaked"
            )

    def _claim(self, owner: dict[int, str], slot: int, name: str) -> None:
        if not self.state_pool.is_allocated(slot):
            raise RadixIntegrityError(f"{name} owns state slot {slot}, which is free or outside the pool")
        if slot in owner:
            raise RadixIntegrityError(f"state slot {slot} belongs to {owner[slot]} and to {name}")
        owner[slot] = name
