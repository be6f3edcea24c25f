"""Recounts a prefix cache from nothing and compares with what it believes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.tree_node import RadixIntegrityError, TreeNode


def check_integrity(
    cache: RadixCache, held: torch.Tensor | int | None = None, held_units: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Recount the whole tree and raise RadixIntegrityError at the first thing that is wrong.

    ``held`` are the slots [n] that requests own in addition to the tree, or their count in tokens of whole pages; with
    it, free + tree + held must be the whole pool. ``held_units``, by unit, are what requests hold of the companions'
    units, and as exact.
    """
    _check_tree(cache, held)
    for companion in cache.companions:
        companion.check(cache.nodes(), None if held_units is None else held_units.get(companion.unit, ()))


def _check_tree(cache: RadixCache, held: torch.Tensor | int | None) -> None:
    """Links, locks, pages, counters and slots of ``cache``; arguments as in ``check_integrity``."""
    values: list[np.ndarray] = []
    evictable = protected = num_nodes = 0
    stack = [cache.root]
    if cache.root.parent is not None or cache.root.key.size or cache.root.value.size:
        raise RadixIntegrityError("the root has a parent, tokens or slots")
    while stack:
        node = stack.pop()
        for child_key, child in node.children.items():
            _check_link(cache, node, child_key, child)
            _check_pages(cache, child)
            num_nodes += 1
            values.append(child.value)
            if child.lock_ref:
                protected += child.value.size
            else:
                evictable += child.value.size
                _check_offered(cache, child)
            stack.append(child)
    for node in cache._withdrawn:
        if not node.withdrawn or node.lock_ref < 1:
            raise RadixIntegrityError(f"node {node.id} is kept as withdrawn, with {node.lock_ref} locks")
        values.append(node.value)
    if num_nodes != cache._num_nodes:
        raise RadixIntegrityError(f"the tree has {num_nodes} nodes, its counter says {cache._num_nodes}")
    for name, counted, kept in (
        ("evictable", evictable, cache.evictable_size()),
        ("protected", protected, cache.protected_size()),
    ):
        if counted != kept:
            raise RadixIntegrityError(f"{counted} {name} tokens counted, the counter says {kept}")
    _check_partition(cache, np.concatenate(values) if values else np.empty(0, np.int64), held)


def _check_link(cache: RadixCache, parent: TreeNode, child_key: int | bytes, child: TreeNode) -> None:
    where = f"node {child.id} under {parent.id}"
    if child.parent is not parent:
        raise RadixIntegrityError(f"{where} names {getattr(child.parent, 'id', None)} as its parent")
    if child.key.size == 0 or child.key.size != child.value.size:
        raise RadixIntegrityError(f"{where} has {child.key.size} tokens and {child.value.size} slots")
    if cache._child_key(child.key) != child_key:
        raise RadixIntegrityError(f"{where} is filed under {child_key!r} but starts with {child.key[:4].tolist()}")
    if child.lock_ref < 0:
        raise RadixIntegrityError(f"{where} has {child.lock_ref} locks")
    if parent is not cache.root and parent.last_access < child.last_access:
        raise RadixIntegrityError(f"{where} was used at {child.last_access}, after its parent {parent.last_access}")
    if parent is not cache.root and child is next(iter(parent.children.values())):
        below = sum(sibling.lock_ref for sibling in parent.children.values())
        if parent.lock_ref < below:
            raise RadixIntegrityError(f"node {parent.id} has {parent.lock_ref} locks, its children {below}")


def _check_pages(cache: RadixCache, node: TreeNode) -> None:
    page = cache.page_size
    if node.value.size % page:
        raise RadixIntegrityError(f"node {node.id} has {node.value.size} slots, not whole pages of {page}")
    pages = node.value.reshape(-1, page)
    if (pages[:, 0] % page).any() or (pages - pages[:, :1] != np.arange(page)).any():
        raise RadixIntegrityError(f"node {node.id} has slots that do not sit in whole pages of {page}")


def _check_offered(cache: RadixCache, node: TreeNode) -> None:
    if cache._is_evictable(node) and (node.heap_key is None or node.heap_key > cache._eviction_key(node)):
        raise RadixIntegrityError(f"leaf {node.id} can be evicted but eviction would not find it")


def _check_partition(cache: RadixCache, in_tree: np.ndarray, held: torch.Tensor | int | None) -> None:
    """No slot has two owners, and with ``held`` none is without."""
    allocator, page = cache.allocator, cache.page_size
    free = allocator.free_slots().numpy()
    held_slots: np.ndarray = np.empty(0, np.int64)
    if isinstance(held, torch.Tensor):
        held_pages = np.unique(held.numpy() // page)
        held_slots = (held_pages[:, None] * page + np.arange(page)).reshape(-1)
        if np.unique(held.numpy()).size != held.numel():
            raise RadixIntegrityError("two requests hold the same slot")
    owners = np.concatenate([in_tree, free, held_slots])
    if owners.size and (owners.min() < page or owners.max() >= allocator.size + page):
        raise RadixIntegrityError(f"slots outside {page}..{allocator.size + page - 1} are in the tree, free or held")
    count = np.bincount(owners, minlength=allocator.size + page)
    twice = np.flatnonzero(count > 1)
    if twice.size:
        slot = int(twice[0])
        sides = [
            f"{int((group == slot).sum())}x {name}"
            for name, group in (("tree", in_tree), ("free", free), ("held by requests", held_slots))
        ]
        raise RadixIntegrityError(f"{twice.size} slots have two owners, the first is {slot}: {', '.join(sides)}")
    if held is not None:
        num_held = held_slots.size if isinstance(held, torch.Tensor) else held
        total = in_tree.size + free.size + num_held
        if total != allocator.size:
            raise RadixIntegrityError(
                f"free {free.size} + tree {in_tree.size} + held {num_held} = {total} tokens, the pool has "
                f"{allocator.size}: {allocator.size - total} tokens leaked"
            )
