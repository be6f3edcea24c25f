"""Pages of window slots, each lent to a page of full slots: one table, on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from sglang.srt.configs.cache_layout import TOMBSTONE_PAGE, WINDOW_DUMMY_PAGES
from sglang.srt.mem_cache.slot_list import SlotAccountingError, SlotList


class WindowPages:
    """Which page of the window's pools each page of full slots has: ``table`` [full pages + 1] int32 on the device.

    A token at offset o of full page f has its window row at slot ``table[f] * page_size + o``. A full page gets a
    window page when it is handed out, and gives it back with itself or before; ``TOMBSTONE_PAGE`` then stands in the
    table, whose rows are NaN. The dummy page has the dummy. The host's table is the truth; ``flush`` writes what has
    changed to the device, after the steps that are queued. On CPU both are the same memory.
    """

    def __init__(self, num_full_pages: int, num_pages: int, page_size: int, device: torch.device | str = "cpu") -> None:
        """``num_pages`` can be lent. Raises ValueError where there is none."""
        if num_pages < 1:
            raise ValueError(f"a window needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._pages = SlotList("window page", WINDOW_DUMMY_PAGES, num_pages)
        self._host: np.ndarray = np.zeros(num_full_pages + 1, dtype=np.int32)
        table = torch.from_numpy(self._host)
        self._is_shared = torch.device(device).type == "cpu"
        self.table = table if self._is_shared else table.to(device)
        self._changed: set[int] = set()
        # Called with each window page that comes back; for debugging.
        self.on_return: Callable[[int], None] = lambda page: None
        self.clear()

    def clear(self) -> None:
        """Take every page back, even those in use."""
        self._pages.clear()
        self._host[1:] = TOMBSTONE_PAGE
        self._changed.clear()
        if not self._is_shared:
            self.table.copy_(torch.from_numpy(self._host))

    def num_free(self) -> int:
        """Pages that can be lent now."""
        return self._pages.available_size()

    def are_live(self, full_pages: np.ndarray) -> np.ndarray:
        """Which of ``full_pages`` [n] have a window page: bool [n]."""
        live: np.ndarray = self._host[full_pages] > TOMBSTONE_PAGE
        return live

    def lend(self, full_pages: Iterable[int]) -> None:
        """Give each a window page, the lowest first on fresh pools. Raises SlotAccountingError if that cannot be."""
        for full in full_pages:
            page = None if self._host[full] > TOMBSTONE_PAGE or full < 1 else self._pages.alloc()
            if page is None:
                raise SlotAccountingError(f"page {full} cannot get a window page: it has one, or none is free")
            self._set(full, page)

    def take_back(self, full_pages: np.ndarray) -> int:
        """Take the window pages of ``full_pages`` [n] back, of those that have one; how many."""
        held: list[int] = full_pages[self.are_live(full_pages)].tolist()
        for full in reversed(held):  # so that the next to be lent are in the order in which these stand
            page = int(self._host[full])
            self._pages.free(page)
            self._set(full, TOMBSTONE_PAGE)
            self.on_return(page)
        return len(held)

    def move(self, source: int, target: int) -> None:
        """Let full page ``target``, which has none, have the window page of ``source``."""
        if self._host[target] > TOMBSTONE_PAGE or self._host[source] <= TOMBSTONE_PAGE:
            raise SlotAccountingError(f"the window of page {source} cannot go to page {target}: no window, or a second")
        self._set(target, int(self._host[source]))
        self._set(source, TOMBSTONE_PAGE)

    def lent(self) -> dict[int, int]:
        """All full pages that have a window page, and which."""
        full = np.flatnonzero(self._host > TOMBSTONE_PAGE)
        return dict(zip(full.tolist(), self._host[full].tolist(), strict=True))

    def flush(self) -> None:
        """Let the steps that are queued from now on see the table as it is."""
        if not self._changed or self._is_shared:
            self._changed.clear()
            return
        pages = np.array(sorted(self._changed), dtype=np.int64)
        pair = torch.from_numpy(np.stack((pages, self._host[pages]))).to(self.table.device, non_blocking=True)
        self.table.index_copy_(0, pair[0], pair[1].to(torch.int32))
        self._changed.clear()

    def _set(self, full: int, page: int) -> None:
        self._host[full] = page
        self._changed.add(full)
