"""A node of the prefix tree, and what lookups and insertions report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ChildKey = int | bytes
HeapKey = tuple[int, int, int]


class TreeNode:
    """One edge of the tree: ``key`` and ``value`` [n] int64 are its tokens and their slots; n is 0 at the root only.

    ``lock_ref`` counts the locks on this node and its descendants. A ``withdrawn`` node has left the tree: only
    locks keep its slots.
    """

    __slots__ = (
        "children", "heap_key", "id", "key", "last_access", "lock_ref", "parent", "value", "withdrawn",
    )  # fmt: skip

    def __init__(self, node_id: int, parent: TreeNode | None, key: np.ndarray, value: np.ndarray):
        self.id = node_id
        self.parent = parent
        self.children: dict[ChildKey, TreeNode] = {}
        self.key = key
        self.value = value
        self.lock_ref = 0
        self.last_access = 0
        self.heap_key: HeapKey | None = None
        self.withdrawn = False


class RadixIntegrityError(RuntimeError):
    """The prefix cache is inconsistent."""


@dataclass(frozen=True, eq=False)
class MatchResult:
    """The longest usable prefix: its slots [n] int64 (host) and the node where it ends.

    ``kv_len >= n`` tokens are cached as KV; the part past n cannot be used, because a companion lacks what it needs.
    """

    slot_ids: torch.Tensor
    node: TreeNode
    kv_len: int


@dataclass(frozen=True, eq=False)
class InsertResult:
    """The result of an insertion.

    The first ``prefix_len`` tokens were in the tree already; the caller frees its duplicate slots.
    The first ``cached_len`` tokens are in the tree now, ending at ``node``; the slots past it stay the caller's.
    """

    prefix_len: int
    node: TreeNode
    cached_len: int
