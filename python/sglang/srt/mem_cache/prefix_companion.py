"""What a prefix needs next to its KV slots so that it can be used again: the interface of the tree's companions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from sglang.srt.mem_cache.tree_node import InsertResult, TreeNode

# What a request holds of a companion's unit while it runs.
Held = TypeVar("Held")


class PrefixCompanion(ABC, Generic[Held]):
    """Keeps, for nodes of the prefix tree, what lives by another allocator than their KV slots.

    A prefix can be used up to the deepest node at which every companion is alive. A companion may let go of what it
    keeps while the KV stays; it owns what it keeps, and requests own what they hold. ``unit`` names the unit that it
    hands out, ``cuttable`` says whether the upper part of a node that is cut can be alive. Where requests can run short
    of the unit, ``is_limit`` is set, and each token of a step takes one.
    """

    unit: str
    cuttable: bool
    is_limit = False

    def bind(self, offer: Callable[[TreeNode], None]) -> None:
        """Called by the tree; ``offer`` takes a node whose rank in eviction has become lower."""
        self.offer = offer

    @abstractmethod
    def is_alive(self, node: TreeNode) -> bool:
        """Whether a prefix that ends with ``node`` can be used; a leaf for which that is not so is evicted first."""

    @abstractmethod
    def on_match(self, path: Sequence[TreeNode]) -> None:
        """A prefix was found, root first, never empty: what it needs counts as used."""

    @abstractmethod
    def on_split(self, upper: TreeNode, lower: TreeNode) -> None:
        """``lower`` was cut, and ``upper`` is its new parent with the first part of its tokens."""

    @abstractmethod
    def on_insert(self, result: InsertResult, num_tokens: int, held: Held) -> None:
        """A running request, which holds ``held`` after ``num_tokens`` tokens, has cached a prefix of them."""

    @abstractmethod
    def on_drop(self, node: TreeNode) -> None:
        """``node`` leaves the tree: take back what is kept for it. May be called again for the same node."""

    @abstractmethod
    def fork(self, node: TreeNode) -> Held | None:
        """What a request that starts behind ``node`` (the root: from nothing) holds; None when nothing is to be had."""

    @abstractmethod
    def release(self, held: Held) -> None:
        """Take back what a request holds."""

    def room(self) -> int:
        """Units that can be had now, eviction included; asked only of a limit."""
        raise NotImplementedError(f"requests cannot run short of {self.unit} slots")

    def needs(self, num_tokens: int) -> int:
        """Units that a request needs at one time until it has ``num_tokens`` more tokens; asked only of a limit."""
        return num_tokens

    @abstractmethod
    def num_held(self) -> int:
        """Units that requests hold."""

    @abstractmethod
    def check(self, nodes: Iterable[TreeNode], held: Sequence[Held] | None) -> None:
        """Recount what is kept for ``nodes``, all nodes of the tree, and raise RadixIntegrityError where it is wrong.

        With ``held``, of all requests, what is free, kept and held must be all there is.
        """
