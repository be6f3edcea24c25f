"""Hands out KV slots and request rows on the host, and refuses to take back what it did not hand out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang.srt.mem_cache.slot_list import SlotAccountingError, SlotList
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.model_executor.forward_batch_info import low_words

_MAX_SLOT = 2**31 - 1  # slot ids are kept as int32 in the request table


class TokenToKVPoolAllocator:
    """Host-side allocator of KV slots in whole pages.

    Slots ``page_size .. size + page_size - 1`` are handed out; page 0 is the dummy that padded rows write to, so a pool
    needs ``size + page_size`` rows. A page belongs to one owner at a time, and position ``p`` of a sequence is always
    at offset ``p % page_size`` of its page. Pages are reused last-in first-out, from the lowest on a fresh pool, so the
    same calls give the same slots. All tensors are int64 on the host. With ``window`` each page gets a window page when
    it is handed out, and has none when it comes back.
    """

    def __init__(self, size: int, page_size: int = 1, window: WindowPages | None = None):
        if page_size < 1 or size < page_size or size % page_size:
            raise ValueError(f"size must be a positive multiple of page_size, got {size=} and {page_size=}")
        if size + page_size > _MAX_SLOT:
            raise ValueError(f"size + page_size must stay below 2**31 (slot ids are int32), got {size=}")
        self.size = size
        self.page_size = page_size
        self.num_pages = size // page_size
        self.window = window
        self._offsets: np.ndarray = np.arange(page_size, dtype=np.int64)
        self._slot_mark: np.ndarray = np.zeros(size + page_size, dtype=np.int32)
        self._page_mark: np.ndarray = np.zeros(self.num_pages + 1, dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Take every slot back, even those in use."""
        self._stack: np.ndarray = np.arange(self.num_pages, 0, -1, dtype=np.int64)
        self._top = self.num_pages
        # Slots in use of each page; 0 means that the page is free.
        self._used: np.ndarray = np.zeros(self.num_pages + 1, dtype=np.int32)
        if self.window is not None:
            self.window.clear()

    def available_size(self) -> int:
        """Tokens that fit into free pages, not counting windows."""
        return self._top * self.page_size

    def free_slots(self) -> torch.Tensor:
        """Every slot of every free page, ascending."""
        pages = np.sort(self._stack[: self._top])
        return torch.from_numpy((pages[:, None] * self.page_size + self._offsets).reshape(-1))

    def _pop_pages(self, num_pages: int) -> np.ndarray | None:
        if num_pages > self._top or (self.window is not None and num_pages > self.window.num_free()):
            return None
        self._top -= num_pages
        pages = self._stack[self._top : self._top + num_pages][::-1].copy()
        if self.window is not None:
            self.window.lend(pages.tolist())
        return pages

    def alloc(self, num_tokens: int) -> torch.Tensor | None:
        """Slots of ``num_tokens / page_size`` whole pages, or None, with no change, if they are not free."""
        if num_tokens < 0 or num_tokens % self.page_size:
            raise ValueError(f"alloc takes a multiple of page_size {self.page_size}, got {num_tokens}")
        pages = self._pop_pages(num_tokens // self.page_size)
        if pages is None:
            return None
        self._used[pages] = self.page_size
        if self.page_size == 1:
            return torch.from_numpy(pages)
        return torch.from_numpy((pages[:, None] * self.page_size + self._offsets).reshape(-1))

    def alloc_extend(
        self, prefix_lens: Sequence[int], seq_lens: Sequence[int], last_slots: Sequence[int]
    ) -> torch.Tensor | None:
        """Slots for tokens ``prefix_lens[i] .. seq_lens[i]`` of every request, requests one after the other.

        ``last_slots[i]`` is the slot of token ``prefix_lens[i] - 1``, or -1 without a prefix; the rest of its page is
        filled first. Returns None, and changes nothing, when not all requests fit.
        """
        prefix = np.asarray(prefix_lens, dtype=np.int64)
        lens = np.asarray(seq_lens, dtype=np.int64)
        if (prefix > lens).any() or (prefix < 0).any():
            raise ValueError(f"0 <= prefix_len <= seq_len must hold, got {list(prefix_lens)} and {list(seq_lens)}")
        if self.page_size == 1:
            return self.alloc(int((lens - prefix).sum()))
        last = np.asarray(last_slots, dtype=np.int64)
        self._check_last_slots(prefix, last)
        page = self.page_size
        new_pages = -(-lens // page) - -(-prefix // page)
        pages = self._pop_pages(int(new_pages.sum()))
        if pages is None:
            return None
        out: np.ndarray = np.empty(int((lens - prefix).sum()), dtype=np.int64)
        row = taken = 0
        for i, (start, end, num_new) in enumerate(zip(prefix.tolist(), lens.tolist(), new_pages.tolist())):
            head = min(end - start, -start % page)
            if head:
                out[row : row + head] = last[i] + 1 + self._offsets[:head]
                self._used[last[i] // page] += head
                row += head
            tail = end - start - head
            if tail:
                mine = pages[taken : taken + num_new]
                taken += num_new
                out[row : row + tail] = (mine[:, None] * page + self._offsets).reshape(-1)[:tail]
                self._used[mine] = page
                self._used[mine[-1]] = tail - (num_new - 1) * page
                row += tail
        return torch.from_numpy(out)

    def alloc_decode(self, seq_lens: Sequence[int], last_slots: Sequence[int]) -> torch.Tensor | None:
        """One slot for the newest token of every request; ``seq_lens`` count that token.

        ``last_slots[i]`` is the slot of the token before it, or -1 when there is none. Returns None, and changes
        nothing, when not all requests fit.
        """
        if self.page_size == 1:
            return self.alloc(len(seq_lens))
        prefix = np.asarray(seq_lens, dtype=np.int64) - 1
        last = np.asarray(last_slots, dtype=np.int64)
        self._check_last_slots(prefix, last)
        opens_page = prefix % self.page_size == 0
        pages = self._pop_pages(int(opens_page.sum()))
        if pages is None:
            return None
        out = last + 1
        out[opens_page] = pages * self.page_size
        self._used[out // self.page_size] += 1
        return torch.from_numpy(out)

    def _check_last_slots(self, prefix: np.ndarray, last: np.ndarray) -> None:
        """Check that each last slot is the last used slot of its page: only then the rest of the page may be filled."""
        if prefix.shape != last.shape:
            raise ValueError(f"one last slot per request is needed, got {last.size} for {prefix.size} requests")
        inside = prefix % self.page_size != 0
        if not inside.any():
            return
        slots, offset = last[inside], (prefix[inside] - 1) % self.page_size
        pages = slots // self.page_size
        if (pages < 1).any() or (pages > self.num_pages).any():
            raise SlotAccountingError(f"last slots outside the pool: {slots.tolist()}")
        self._page_mark[pages] = np.arange(pages.size)
        alone = self._page_mark[pages] == np.arange(pages.size)
        bad = (slots % self.page_size != offset) | (self._used[pages] != offset + 1) | ~alone
        if bad.any():
            raise SlotAccountingError(
                f"slots {slots[bad].tolist()} are not the last used slots of their pages for prefix lengths "
                f"{prefix[inside][bad].tolist()} at page_size {self.page_size}, or two requests share a partial page"
            )

    def free(self, slot_ids: torch.Tensor) -> None:
        """Take slots [N] back, page by page; every slot in use of a page must come in the same call.

        Raises SlotAccountingError, and changes nothing, for a slot that is out of range, not handed out, listed twice,
        or whose page is only freed in part.
        """
        slots = slot_ids.numpy()
        count = slots.size
        if count == 0:
            return
        if slots.min() < self.page_size or slots.max() >= self.size + self.page_size:
            bad = slots[(slots < self.page_size) | (slots >= self.size + self.page_size)]
            raise SlotAccountingError(
                f"slots {bad[:8].tolist()} are outside {self.page_size}..{self.size + self.page_size - 1}"
            )
        order = np.arange(count, dtype=np.int32)
        self._slot_mark[slots] = order
        repeated = self._slot_mark[slots] != order
        if repeated.any():
            raise SlotAccountingError(f"slots {slots[repeated][:8].tolist()} are listed twice in one free")
        pages = slots
        if self.page_size > 1:
            pages = slots // self.page_size
            self._page_mark[pages] = order
            pages = pages[self._page_mark[pages] == order]
        if not self._used[pages].all():
            bad = pages[self._used[pages] == 0]
            raise SlotAccountingError(f"pages {bad[:8].tolist()} (page_size {self.page_size}) are already free")
        if self.page_size > 1:
            self._check_whole_pages(slots, pages)
        self._used[pages] = 0
        if self.window is not None:
            self.window.take_back(pages)
        # Reversed, so that the next alloc takes the pages in the order in which they were listed.
        self._stack[self._top : self._top + pages.size] = pages[::-1]
        self._top += pages.size

    def _check_whole_pages(self, slots: np.ndarray, pages: np.ndarray) -> None:
        self._page_mark[pages] = np.arange(pages.size)
        given = np.bincount(self._page_mark[slots // self.page_size], minlength=pages.size)
        partial = given != self._used[pages]
        if partial.any():
            page, got = int(pages[partial][0]), int(given[partial][0])
            raise SlotAccountingError(
                f"page {page} has {int(self._used[page])} slots in use and {got} were freed: free whole pages"
            )


class ReqToTokenPool(SlotList):
    """Table from (request row, position) to KV slot: ``req_to_token [size + 1, max_context_len] int32``.

    The host table is authoritative; on CPU the device table is the same memory. One row past the last, ``padding_row``,
    is never handed out and stays zero: padding of a captured batch reads slot 0 through it.
    """

    def __init__(self, size: int, max_context_len: int, device: torch.device | str = "cpu"):
        super().__init__("request row", 0, size)
        self.max_context_len = max_context_len
        self.device = torch.device(device)
        self.padding_row = size
        self._host: np.ndarray = np.zeros((size + 1, max_context_len), dtype=np.int32)
        table = torch.from_numpy(self._host)
        self.req_to_token = table if self.device.type == "cpu" else table.to(self.device)

    @staticmethod
    def num_bytes(size: int, max_context_len: int) -> int:
        """Bytes of the device table of a pool of these sizes."""
        return (size + 1) * max_context_len * np.dtype(np.int32).itemsize

    def write(self, idx: int, start: int, slot_ids: torch.Tensor) -> None:
        """Set positions ``start ..`` of row ``idx`` to ``slot_ids [N]`` (host int64)."""
        self.write_extend([idx], [start], [start + slot_ids.numel()], slot_ids)

    def write_extend(
        self, rows: Sequence[int], starts: Sequence[int], ends: Sequence[int], slot_ids: torch.Tensor
    ) -> None:
        """Set positions ``starts[i] .. ends[i]`` of each row, which takes its part of ``slot_ids [N]`` (host int64)."""
        slots = slot_ids.numpy()
        on_device = None if self.device.type == "cpu" else self._copied(slots.astype(np.int32))
        offset = 0
        for idx, start, end in zip(rows, starts, ends, strict=True):
            self._check_span(idx, start, end)
            stop = offset + end - start
            self._host[idx, start:end] = slots[offset:stop]
            if on_device is not None:
                self.req_to_token[idx, start:end] = on_device[offset:stop]
            offset = stop

    def write_decode(self, rows: Sequence[int], positions: Sequence[int], slot_ids: torch.Tensor) -> None:
        """``table[rows[i], positions[i]] = slot_ids[i]`` on the host; a step writes the device's (``write_step``)."""
        for idx, position in zip(rows, positions):
            if not (self.is_allocated(idx) and 0 <= position < self.max_context_len):
                self._check_span(idx, position, position + 1)  # says which
        self._host[rows, positions] = slot_ids.numpy()

    def write_step(self, rows: torch.Tensor, positions: torch.Tensor, slot_ids: torch.Tensor) -> None:
        """Set positions of each row of the device's table: rows [B], positions and slot_ids [B] or [B, R], int64 there.

        Part of a step, captured or not; rows of padding write slot 0 into the padding row.
        """
        rows = rows.view(-1, *(1,) * (slot_ids.dim() - 1))
        self.req_to_token.index_put_((rows, positions), low_words(slot_ids))

    def _copied(self, values: np.ndarray) -> torch.Tensor:
        """``values`` copied to the device asynchronously, because a step may be running; the host does not change them
        again."""
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def read(self, idx: int, start: int, end: int) -> torch.Tensor:
        """Slots of positions ``start .. end`` of row ``idx``: a host int64 copy [end - start]."""
        self._check_span(idx, start, end)
        return torch.from_numpy(self._host[idx, start:end].astype(np.int64))

    def _check_span(self, idx: int, start: int, end: int) -> None:
        self.check(idx)
        if not 0 <= start <= end <= self.max_context_len:
            raise ValueError(f"positions {start}..{end} of row {idx} are outside the context of {self.max_context_len}")
