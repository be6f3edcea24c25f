"""The interface of companions of the prefix tree, which keep what a prefix needs in addition to KV slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from sglang.srt.mem_cache.tree_node import InsertResult, TreeNode

# What a request holds of a companion's unit while it runs.
Held = TypeVar("Held")


class PrefixCompanion(ABC, Generic[Held]):
    """Keeps, for nodes of the prefix tree, data from another allocator than that of KV slots.

    A prefix can be used up to the last token at which every companion has what it needs. A companion may release what
    it keeps while the KV stays; it owns what it keeps, and requests own what they hold. ``unit`` names the unit that it
    hands out, ``cuttable`` states whether a prefix can end inside a chunk. If requests can run out
    of the unit, ``is_limit`` is set: each token of a step takes one, from the allocator of KV slots.
    """

    unit: str
    cuttable: bool
    is_limit = False

    def bind(self, offer: Callable[[TreeNode], None]) -> None:
        """Called by the tree; ``offer`` is called with a node that should be evicted earlier than before."""
        self.offer = offer

    @abstractmethod
    def usable_len(self, node: TreeNode, num_tokens: int) -> int:
        """Most of the first ``num_tokens`` of ``node``, in whole pages, that a prefix can end with; 0: evict first."""

    @abstractmethod
    def on_match(self, path: Sequence[TreeNode]) -> None:
        """A prefix was found: ``path`` from the root, not empty. What its last node needs counts as used."""

    def on_add(self, node: TreeNode) -> None:  # noqa: B027
        """``node`` was added to the tree with the slots that a request computed."""

    def on_repeat(self, path: Sequence[TreeNode], slots: np.ndarray) -> None:  # noqa: B027
        """A request has computed the tokens of ``path`` again, in ``slots`` [n], from which released data can be
        restored."""

    @abstractmethod
    def on_split(self, upper: TreeNode, lower: TreeNode) -> None:
        """``lower`` was cut, and ``upper`` is its new parent with the first part of its tokens."""

    @abstractmethod
    def on_insert(self, result: InsertResult, num_tokens: int, held: Held) -> None:
        """A running request, which holds ``held`` after ``num_tokens`` tokens, has cached a prefix of them."""

    @abstractmethod
    def on_drop(self, node: TreeNode) -> None:
        """``node`` leaves the tree: free what is kept for it. May be called again for the same node."""

    @abstractmethod
    def fork(self, node: TreeNode) -> Held | None:
        """What a request that starts after ``node`` (the root: from nothing) holds; None when nothing is available."""

    def advance(  # noqa: B027
        self, held: Held, num_tokens: int, cache_protected_len: int, slots_of: Callable[[int, int], torch.Tensor]
    ) -> None:
        """No step of the request will start before ``num_tokens`` again: free what none needs; only for a limit.

        The first ``cache_protected_len`` tokens are in slots of the tree; ``slots_of`` gives the slots of a range of
        positions.
        """

    @abstractmethod
    def release(self, held: Held) -> None:
        """Free what a request holds."""

    @property
    def num_units(self) -> int:
        """Number of units; only for a limit."""
        raise NotImplementedError(f"requests cannot run out of {self.unit} slots")

    def room(self) -> int:
        """Units that are available now, including what eviction can free; only for a limit."""
        raise NotImplementedError(f"requests cannot run out of {self.unit} slots")

    def needs(self, num_tokens: int, running: bool) -> int:
        """Units that a request needs at one time, in addition to those that it holds if it is ``running``, until it has
        ``num_tokens`` more tokens; only for a limit."""
        return num_tokens

    def make_room(self, num_units: int) -> None:
        """Evict until so many are free, or nothing is left to evict; only for a limit."""
        raise NotImplementedError(f"requests cannot run out of {self.unit} slots")

    @abstractmethod
    def num_held(self) -> int:
        """Units that requests hold."""

    @abstractmethod
    def check(self, nodes: Iterable[TreeNode], held: Sequence[Held] | None) -> None:
        """Recount what ``nodes``, all of the tree, and ``held`` requests keep. Raises RadixIntegrityError."""
