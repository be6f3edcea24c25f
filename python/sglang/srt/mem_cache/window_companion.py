"""A sliding window in the prefix tree: the companion of models that read, of most layers, the last tokens alone."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang.srt.configs.cache_layout import SWA
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.tree_node import InsertResult, RadixIntegrityError, TreeNode
from sglang.srt.mem_cache.window_pages import WindowPages


@dataclass
class WindowHold:
    """What a running request keeps of windows: ``locked``, a page of the tree that its next step reads (0: none), and
    those of its own pages from number ``first`` on."""

    locked: int = 0
    first: int = 0


class WindowCompanion(PrefixCompanion[WindowHold]):
    """Window pages of the tree's pages; a prefix can end with any page whose window page is still there.

    The window, and what compressors need of the tokens before, fits into one page. So a request keeps the last page
    that its next step may read, which is also the last that it would cache, and those after it. What the tree keeps is
    evicted unless a request reads it, pages inside of nodes first, at which no prefix has ended so far, then the least
    recently used; the tree's page then stays as a tombstone.
    """

    unit = SWA
    cuttable = True
    is_limit = True

    def __init__(self, window: WindowPages, step_reach: int = 1) -> None:
        """step_reach: slots that a request may have after the tokens that are known, when a step is added to one in
        flight."""
        self._window = window
        self._page = window.page_size
        self._request_pages = 2 - (-step_reach // window.page_size)
        self._kept: dict[int, TreeNode] = {}  # pages of the tree that have a window, and their nodes
        self._unlocked: OrderedDict[int, None] = OrderedDict()  # of these, what can go, in this order
        self._locks: Counter[int] = Counter()

    @property
    def num_units(self) -> int:
        return self._window.num_pages * self._page

    def usable_len(self, node: TreeNode, num_tokens: int) -> int:
        live = np.flatnonzero(self._window.are_live(self._pages_of(node.value[:num_tokens])))
        return (int(live[-1]) + 1) * self._page if live.size else 0

    def on_match(self, path: Sequence[TreeNode]) -> None:
        last = self._last_page(path[-1])
        if last in self._unlocked:
            self._unlocked.move_to_end(last)

    def on_add(self, node: TreeNode) -> None:
        pages = self._pages_of(node.value)
        for page in pages[self._window.are_live(pages)].tolist():
            self._keep(page, node)

    def on_repeat(self, path: Sequence[TreeNode], slots: np.ndarray) -> None:
        """Tombstones get the window pages of the same tokens, computed again."""
        start = 0
        for node in path:
            ours, theirs = self._pages_of(node.value), self._pages_of(slots[start : start + node.value.size])
            revived = ~self._window.are_live(ours) & self._window.are_live(theirs)
            for page, other in zip(ours[revived].tolist(), theirs[revived].tolist(), strict=True):
                self._window.move(other, page)
                self._keep(page, node)
            start += node.value.size

    def on_split(self, upper: TreeNode, lower: TreeNode) -> None:
        for page in self._pages_of(upper.value).tolist():
            if page in self._kept:
                self._kept[page] = upper
        self.offer(lower)  # the pages at which a prefix can end may all be the upper part's

    def on_insert(self, result: InsertResult, num_tokens: int, held: WindowHold) -> None:
        """The request now reads the tree's last page."""
        if result.node.parent is not None:
            self._move_lock(held, self._last_page(result.node))

    def on_drop(self, node: TreeNode) -> None:
        """Forget what is kept; the window pages go with the node's slots, wherever those go."""
        for page in self._pages_of(node.value).tolist():
            self._kept.pop(page, None)
            self._unlocked.pop(page, None)

    def fork(self, node: TreeNode) -> WindowHold:
        """See the base class. Raises RadixIntegrityError for a node at which no prefix can end."""
        held = WindowHold()
        if node.parent is not None:
            self._move_lock(held, self._last_page(node))
        return held

    def advance(
        self, held: WindowHold, num_tokens: int, cache_protected_len: int, slots_of: Callable[[int, int], torch.Tensor]
    ) -> None:
        """Take back the request's own windows after the last whole page of its tokens, and the lock of the tree's."""
        first = num_tokens // self._page - 1
        if first <= held.first:
            return
        own = max(held.first, cache_protected_len // self._page)
        if own < first:
            self._window.take_back(self._pages_of(slots_of(own * self._page, first * self._page).numpy()))
        if first * self._page >= cache_protected_len:
            self._move_lock(held, 0)
        held.first = first

    def release(self, held: WindowHold) -> None:
        self._move_lock(held, 0)

    def room(self) -> int:
        return (self._window.num_free() + len(self._unlocked)) * self._page

    def needs(self, num_tokens: int, running: bool) -> int:
        """For a running request, one page more than it holds; for a new one, all that it holds at one time."""
        return min(num_tokens, self._page if running else self._request_pages * self._page)

    def make_room(self, num_tokens: int) -> None:
        self.evict(-(-num_tokens // self._page) - self._window.num_free())

    def evict(self, num_pages: int) -> int:
        """Take back up to ``num_pages`` pages of the tree; how many."""
        count = max(0, min(num_pages, len(self._unlocked)))
        for _ in range(count):
            page, _ = self._unlocked.popitem(last=False)
            node = self._kept.pop(page)
            self._window.take_back(np.array([page]))
            self.offer(node)
        return count

    def num_held(self) -> int:
        pages = self._window.num_pages - self._window.num_free() - len(self._kept) + len(self._locks)
        return pages * self._page

    def _pages_of(self, slots: np.ndarray) -> np.ndarray:
        pages: np.ndarray = slots[:: self._page] // self._page
        return pages

    def _last_page(self, node: TreeNode) -> int:
        return int(node.value[-1]) // self._page

    def _keep(self, page: int, node: TreeNode) -> None:
        self._kept[page] = node
        if page not in self._locks:
            self._unlocked[page] = None
            self._unlocked.move_to_end(page, last=page == self._last_page(node))

    def _move_lock(self, held: WindowHold, page: int) -> None:
        """Lock ``page`` (0: none) instead of the one that is locked."""
        if page and page not in self._kept:
            raise RadixIntegrityError(f"the window of page {page} is needed but no longer exists")
        if page:
            self._locks[page] += 1
            self._unlocked.pop(page, None)
        if held.locked:
            self._locks[held.locked] -= 1
            if not self._locks[held.locked]:
                del self._locks[held.locked]
                if held.locked in self._kept:
                    self._unlocked[held.locked] = None
        held.locked = page

    def check(self, nodes: Iterable[TreeNode], held: Sequence[WindowHold] | None) -> None:
        """See the base class; that no request's own window is lost shows where no request is left."""
        lent = self._window.lent()
        if len(set(lent.values())) != len(lent) or len(lent) + self._window.num_free() != self._window.num_pages:
            raise RadixIntegrityError(
                f"{len(lent)} pages have {len(set(lent.values()))} window pages, {self._window.num_free()} are free, "
                f"and there are {self._window.num_pages}"
            )
        in_tree = {page: node for node in nodes for page in self._pages_of(node.value).tolist() if page in lent}
        if in_tree != self._kept:
            wrong = sorted(set(in_tree.items()) ^ set(self._kept.items()), key=lambda item: item[0])
            raise RadixIntegrityError(f"window pages and the tree's books differ at pages {[p for p, _ in wrong[:8]]}")
        locked = set(self._locks)
        if set(self._unlocked) != set(self._kept) - locked or min(self._locks.values(), default=1) < 1:
            raise RadixIntegrityError(f"{len(self._kept)} window pages are kept: {len(locked)} locks, "
                                      f"{len(self._unlocked)} can be evicted")  # fmt: skip
        if held is not None:
            asked = Counter(each.locked for each in held if each.locked)
            if asked != self._locks:
                raise RadixIntegrityError(f"requests read the windows of {dict(asked)}, locked are {dict(self._locks)}")
            if not held and len(lent) != len(self._kept):
                raise RadixIntegrityError(f"{len(lent) - len(self._kept)} window pages leaked")
