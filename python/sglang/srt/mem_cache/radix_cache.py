"""A radix tree from token prefixes to the KV slots that hold them, with locks and least-recently-used eviction."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.tree_node import ChildKey, HeapKey, InsertResult, MatchResult, RadixIntegrityError, TreeNode

_EMPTY: np.ndarray = np.empty(0, dtype=np.int64)


class RadixCache:
    """Prefix cache over whole pages of KV slots.

    A slot in the tree belongs to the tree: it goes back to ``allocator`` on eviction. Keys are token ids, or token ids
    packed with what else must be the same (``ReqMemory``), values slot ids; both are compared and copied in bulk, so a
    match or an insertion is linear in its tokens. With ``disable`` the tree stays empty: nothing matches and an
    insertion takes nothing. ``companions`` keep what a prefix needs in addition.
    """

    def __init__(
        self,
        allocator: TokenToKVPoolAllocator,
        page_size: int,
        disable: bool = False,
        companions: Sequence[PrefixCompanion[Any]] = (),
    ):
        if page_size != allocator.page_size:
            raise ValueError(f"page_size {page_size} differs from the allocator's {allocator.page_size}")
        self.allocator = allocator
        self.page_size = page_size
        self.disable = disable
        self.companions = tuple(companions)
        for companion in companions:
            companion.bind(self._offer)
        self._next_id = 0
        self._clock = 0
        self._start_empty()

    def _start_empty(self) -> None:
        self.root = self._new_node(None, _EMPTY, _EMPTY)
        self._num_nodes = 0
        self._heap: list[tuple[HeapKey, TreeNode]] = []
        self._evictable = 0
        self._protected = 0
        self._withdrawn: set[TreeNode] = set()

    def evictable_size(self) -> int:
        """Cached tokens that no lock protects."""
        return self._evictable

    def protected_size(self) -> int:
        """Cached tokens under a lock."""
        return self._protected

    def total_size(self) -> int:
        return self._evictable + self._protected

    def aligned(self, num_tokens: int) -> int:
        """The largest multiple of the page size that is not above ``num_tokens``."""
        return num_tokens - num_tokens % self.page_size

    def reset(self) -> None:
        """Drop every node and return its slots to the allocator; refused while any node is locked."""
        locked = self._protected + sum(node.value.size for node in self._withdrawn)
        if locked:
            raise RadixIntegrityError(f"reset of a prefix cache with {locked} locked tokens")
        self._release(list(self.nodes()))
        self._start_empty()

    # Lookup and insertion

    def match_prefix(self, token_ids: Sequence[int] | np.ndarray) -> MatchResult:
        """The longest cached, usable whole-page prefix; marks it as used, and splits an edge used in part."""
        tokens = self._as_key(token_ids)
        path, matched, inside = self._walk(tokens)
        while path:
            usable = self._usable_len(path[-1], inside or path[-1].key.size)
            if usable:
                if usable < path[-1].key.size:
                    path[-1] = self._split(path[-1], usable)
                break
            path.pop()
            inside = 0
        self._touch(path)
        if path:
            for companion in self.companions:
                companion.on_match(path)
        slots = self._join([node.value for node in path])
        return MatchResult(slots, path[-1] if path else self.root, matched)

    def insert(self, token_ids: Sequence[int] | np.ndarray, slot_ids: torch.Tensor | np.ndarray) -> InsertResult:
        """Cache whole pages of ``token_ids`` [n] in ``slot_ids`` [n] int64. Raises ValueError for other slots."""
        slots = slot_ids.numpy() if isinstance(slot_ids, torch.Tensor) else slot_ids
        if len(token_ids) != slots.size:
            raise ValueError(f"insert needs a slot for each token, got {len(token_ids)} tokens and {slots.size} slots")
        if self.disable:
            return InsertResult(0, self.root, 0)
        tokens = self._as_key(token_ids)
        path, matched, inside = self._walk(tokens)
        if inside:
            path[-1] = self._split(path[-1], inside)
        for companion in self.companions:
            companion.on_repeat(path, slots)
        node = path[-1] if path else self.root
        if matched < tokens.size:
            node = self._add_leaf(node, tokens[matched:].copy(), self._whole_pages(slots[matched : tokens.size]))
            path.append(node)
        self._touch(path)
        return InsertResult(matched, node, tokens.size)

    def path_slots(self, node: TreeNode) -> torch.Tensor:
        """Slots [n] int64 (host) of all tokens from the root to the end of ``node``."""
        return self._join([step.value for step in self._path_up(node)][::-1])

    def _as_key(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The whole pages of ``token_ids`` as int64."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        return tokens[: self.aligned(tokens.size)]

    def _whole_pages(self, slots: np.ndarray) -> np.ndarray:
        slots = slots.astype(np.int64)
        if self.page_size > 1:
            pages = slots.reshape(-1, self.page_size)
            starts = pages[:, :1]
            if (starts % self.page_size).any() or (pages - starts != np.arange(self.page_size)).any():
                raise ValueError(f"slots to cache must be whole pages of {self.page_size} in order, got {slots[:32]}…")
        return slots

    @staticmethod
    def _join(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values) if values else _EMPTY.copy())

    def _child_key(self, tokens: np.ndarray) -> ChildKey:
        return int(tokens[0]) if self.page_size == 1 else tokens[: self.page_size].tobytes()

    def _walk(self, tokens: np.ndarray) -> tuple[list[TreeNode], int, int]:
        """Follow ``tokens`` from the root: the nodes on the path, the tokens matched, and how many of the last node if
        not all."""
        node, matched = self.root, 0
        path: list[TreeNode] = []
        while matched < tokens.size:
            child = node.children.get(self._child_key(tokens[matched:]))
            if child is None:
                break
            same = self.aligned(_common_prefix(child.key, tokens[matched:]))
            path.append(child)
            matched += same
            if same < child.key.size:
                return path, matched, same
            node = child
        return path, matched, 0

    # Changes of the tree

    def _new_node(self, parent: TreeNode | None, key: np.ndarray, value: np.ndarray) -> TreeNode:
        self._next_id += 1
        return TreeNode(self._next_id, parent, key, value)

    def _add_leaf(self, parent: TreeNode, key: np.ndarray, value: np.ndarray) -> TreeNode:
        leaf = self._new_node(parent, key, value)
        parent.children[self._child_key(key)] = leaf
        self._num_nodes += 1
        self._evictable += value.size
        for companion in self.companions:
            companion.on_add(leaf)
        self._offer(leaf)
        return leaf

    def _split(self, node: TreeNode, length: int) -> TreeNode:
        """Cut ``node`` after ``length`` tokens; returns the new upper part, since locks name the lower one."""
        parent = node.parent
        assert parent is not None
        upper = self._new_node(parent, node.key[:length].copy(), node.value[:length].copy())
        parent.children[self._child_key(node.key)] = upper
        upper.lock_ref = node.lock_ref
        node.key, node.value = node.key[length:].copy(), node.value[length:].copy()
        node.parent = upper
        upper.children[self._child_key(node.key)] = node
        self._num_nodes += 1
        for companion in self.companions:
            companion.on_split(upper, node)
        return upper

    def _path_up(self, node: TreeNode) -> Iterator[TreeNode]:
        """``node`` and its ancestors, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def nodes(self) -> Iterator[TreeNode]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _usable_len(self, node: TreeNode, num_tokens: int) -> int:
        """The most of the first ``num_tokens`` of ``node`` after which a usable prefix can end; 0 for none."""
        before = -1
        usable = num_tokens
        while usable != before:
            before = usable
            for companion in self.companions:
                usable = companion.usable_len(node, usable) if usable else 0
        return usable

    def _touch(self, path: list[TreeNode]) -> None:
        self._clock += 1
        for node in path:
            node.last_access = self._clock

    # Locks

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Protect ``node`` and all its ancestors from eviction."""
        for step in self._path_up(node):
            if step.lock_ref == 0:
                self._evictable -= step.value.size
                self._protected += step.value.size
            step.lock_ref += 1

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one ``inc_lock_ref`` of the same node."""
        for step in self._path_up(node):
            if step.lock_ref == 0:
                raise RadixIntegrityError(f"node {step.id} is unlocked more often than it was locked")
            step.lock_ref -= 1
            if step.lock_ref:
                continue
            if step.withdrawn:
                self._withdrawn.remove(step)
                self._release([step])
            else:
                self._evictable += step.value.size
                self._protected -= step.value.size
                self._offer(step)

    # Withdrawal

    def withdraw(self, node: TreeNode, keep: int) -> None:
        """Remove the path to ``node`` past its first ``keep`` tokens, and all nodes below it, from the cache.

        It no longer matches. Locked slots are freed with the last lock, the others at once. Requests
        that hold such a lock continue, and must not insert what they compute on it (``TreeNode.withdrawn``).
        """
        start, top = 0, None
        for top in list(self._path_up(node))[::-1]:
            start += top.key.size
            if start > keep:
                break
        if top is None or start <= keep or top.withdrawn:
            return
        parent = top.parent
        assert parent is not None
        del parent.children[self._child_key(top.key)]
        branch = [top]
        for step in branch:
            branch += step.children.values()
        for step in branch:
            self._withdraw_one(step)
        self._release([step for step in branch if not step.lock_ref])
        self._offer(parent)

    def _withdraw_one(self, node: TreeNode) -> None:
        node.children = {}
        node.withdrawn = True
        node.heap_key = None
        self._num_nodes -= 1
        for companion in self.companions:
            companion.on_drop(node)
        if node.lock_ref:
            self._protected -= node.value.size
            self._withdrawn.add(node)
        else:
            self._evictable -= node.value.size

    # Eviction. Each evictable leaf has a live entry on the heap, with its key at the time of the offer. Use makes a key
    # larger: a stale entry that is popped is pushed again with its present key, so the order stays exact.

    def _eviction_key(self, node: TreeNode) -> HeapKey:
        """The smallest key is evicted first: leaves with which no prefix can end, then the least recently used."""
        return (int(self._usable_len(node, node.key.size) > 0), node.last_access, node.id)

    def _is_evictable(self, node: TreeNode) -> bool:
        return not node.children and node.lock_ref == 0 and node is not self.root

    def _offer(self, node: TreeNode) -> None:
        """Push ``node`` to the heap if it can be evicted, unless it has an entry there that is early enough."""
        if not self._is_evictable(node):
            return
        key = self._eviction_key(node)
        if node.heap_key is not None and node.heap_key <= key:
            return
        node.heap_key = key
        heapq.heappush(self._heap, (key, node))
        if len(self._heap) > 2 * self._num_nodes + 64:
            self._heap = [entry for entry in self._heap if entry[1].heap_key == entry[0]]
            heapq.heapify(self._heap)

    def _pop_victim(self) -> TreeNode | None:
        while self._heap:
            key, node = heapq.heappop(self._heap)
            if node.heap_key != key:
                continue
            node.heap_key = None
            if not self._is_evictable(node):
                continue
            if self._eviction_key(node) == key:
                return node
            self._offer(node)
        return None

    def evict(self, num_tokens: int) -> int:
        """Free at least ``num_tokens`` unlocked tokens, if there are, by whole leaves, oldest first; how many."""
        victims: list[TreeNode] = []
        freed = 0
        while freed < num_tokens:
            node = self._pop_victim()
            if node is None:
                break
            assert node.parent is not None
            del node.parent.children[self._child_key(node.key)]
            freed += node.value.size
            self._num_nodes -= 1
            victims.append(node)
            self._offer(node.parent)
        self._evictable -= freed
        self._release(victims)
        return freed

    def _release(self, nodes: list[TreeNode]) -> None:
        """Free what removed nodes owned."""
        if nodes:
            self.allocator.free(self._join([node.value for node in nodes]))
        for companion in self.companions:
            for node in nodes:
                companion.on_drop(node)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(a.size, b.size)
    differs = a[:n] != b[:n]
    first = int(differs.argmax())
    return first if differs[first] else n
