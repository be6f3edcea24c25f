"""Recurrent states in the prefix tree: the companion of models whose prefixes are KV slots plus one state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from sglang.srt.configs.cache_layout import STATE
from sglang.srt.mem_cache.memory_pool import StateSlots
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.tree_node import InsertResult, RadixIntegrityError, TreeNode


class StateCompanion(PrefixCompanion[int]):
    """Copies of states at the ends of nodes; a request holds one live slot.

    KV can be split at any page, but a state cannot: the upper part of a split node has none. A node whose state was
    evicted stays as a tombstone, whose KV shows that a snapshot there would be useful. What the tree keeps is never
    written again, and is evicted least recently used first; locks protect only KV.
    """

    unit = STATE
    cuttable = False

    def __init__(self, slots: StateSlots) -> None:
        self.slots = slots
        self._kept: OrderedDict[TreeNode, int] = OrderedDict()  # least recently used first

    def num_held(self) -> int:
        return self.slots.size - self.slots.available_size() - len(self._kept)

    def usable_len(self, node: TreeNode, num_tokens: int) -> int:
        return num_tokens if num_tokens == node.key.size and node in self._kept else 0

    def on_match(self, path: Sequence[TreeNode]) -> None:
        self._kept.move_to_end(path[-1])

    def on_split(self, upper: TreeNode, lower: TreeNode) -> None:
        """The state stays at the end of ``lower``."""

    def on_insert(self, result: InsertResult, num_tokens: int, held: int) -> None:
        """Keep a copy of the live state if the prefix is all that the request has computed.

        There is none when the tokens are not whole pages, when the node has a state already (which then counts as
        used), or when no slot is available even after eviction.
        """
        node = result.node
        if result.cached_len != num_tokens or node.parent is None:
            return
        if node in self._kept:
            self._kept.move_to_end(node)
            return
        slot = self._alloc(zero=False)
        if slot is not None:
            self.slots.copy(held, slot)
            self._kept[node] = slot

    def on_drop(self, node: TreeNode) -> None:
        slot = self._kept.pop(node, None)
        if slot is not None:
            self.slots.free(slot)

    def fork(self, node: TreeNode) -> int | None:
        """A live slot that starts from the state of ``node``: a copy of it, or zero for the root.

        Evicts states of the tree when no slot is free, that of ``node`` last; it is then handed over without a copy.
        So None means that requests hold every slot.
        """
        if node.parent is None:
            return self._alloc(zero=True)
        if node not in self._kept:
            raise RadixIntegrityError(f"the state of node {node.id} was evicted between match and copy")
        slot = self._alloc(zero=False, keep=node)
        if slot is None:
            return self._detach(node)
        self.slots.copy(self._kept[node], slot)
        return slot

    def release(self, held: int) -> None:
        self.slots.free(held)

    def evict(self, num_states: int, keep: TreeNode | None = None) -> int:
        """Free up to ``num_states`` states, least recently used first, and not that of ``keep``; returns how many."""
        victims = list(islice((node for node in self._kept if node is not keep), num_states))
        for node in victims:
            self.slots.free(self._detach(node))
        return len(victims)

    def _alloc(self, zero: bool, keep: TreeNode | None = None) -> int | None:
        if not self.slots.available_size():
            self.evict(1, keep)
        return self.slots.alloc(zero=zero)

    def _detach(self, node: TreeNode) -> int:
        """Remove the state of a node, which stays in the tree as a tombstone."""
        slot = self._kept.pop(node)
        self.offer(node)
        return slot

    def check(self, nodes: Iterable[TreeNode], held: Sequence[int] | None) -> None:
        owner: dict[int, str] = {}
        for node in nodes:
            if node in self._kept:
                self._claim(owner, self._kept[node], f"node {node.id}")
        if len(owner) != len(self._kept):
            raise RadixIntegrityError(f"{len(self._kept)} states are kept, {len(owner)} of them by nodes of the tree")
        if held is None:
            return
        for slot in held:
            self._claim(owner, slot, "a request")
        free = self.slots.available_size()
        total = len(owner) + free
        if total != self.slots.size:
            raise RadixIntegrityError(
                f"free {free} + tree {len(self._kept)} + held {len(held)} = {total} states, the pool has "
                f"{self.slots.size}: {self.slots.size - total} leaked"
            )

    def _claim(self, owner: dict[int, str], slot: int, name: str) -> None:
        if not self.slots.is_allocated(slot):
            raise RadixIntegrityError(f"{name} owns state slot {slot}, which is free or outside the pool")
        if slot in owner:
            raise RadixIntegrityError(f"state slot {slot} belongs to {owner[slot]} and to {name}")
        owner[slot] = name
