"""The plan of a step of compressed attention: which rows of the pools its tokens read and write.

Made on the device from lengths in device memory; its shapes follow from the sizes of the step alone. So the same
function plans eagerly and inside a captured step, for prompts, decode and verify steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch

from sglang.srt.configs.deepseek_v4_cache import ENTRY_TOKENS, PAGE_SIZE


@dataclass(frozen=True)
class EntryPlan:
    """What the compressors of one ratio m do in a step of N rows: C entries at most are closed.

    visible [N] int32: entries that a row sees, 0 for padding. state_rows [N] int64: where the row's products go, 0 (the
    dummy page) for those that nothing needs. States are in pages of the window.
    entry_rows [C] int64: where a closed entry goes, 0 past the last one; first_positions [C] int64: of its first token.
    sources [C, W] int64: the tokens that it is made of, in order: j >= 0 row j of the step, -2 - s row s of the states,
    -1 none. The last of them closes the entry; all are -1 past the last entry.
    """

    visible: torch.Tensor
    state_rows: torch.Tensor
    entry_rows: torch.Tensor
    first_positions: torch.Tensor
    sources: torch.Tensor


@dataclass(frozen=True)
class CompressedPlan:
    """What the layers of a step of N rows and B requests share.

    requests [N] int64: the request of each row, any for padding. store_slots [N] int64: where its own row of the window
    goes, 0 for padding. window_slots [N, W] int32: slots of the window, the row's own last, -1 before the sequence and
    everywhere for padding. page_table [B, P] int32: pages of each request, this step's included, 0 past the last.
    entries: by ratio.
    """

    requests: torch.Tensor
    store_slots: torch.Tensor
    window_slots: torch.Tensor
    page_table: torch.Tensor
    entries: Mapping[int, EntryPlan]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors, in a fixed order."""
        yield from (self.requests, self.store_slots, self.window_slots, self.page_table)
        for ratio in sorted(self.entries):
            yield from (getattr(self.entries[ratio], field.name) for field in fields(EntryPlan))


@dataclass(frozen=True)
class StepRows:
    """The rows of a step on the device: N rows, packed by request, of B requests.

    out_cache_loc [N] int64: slots; those of the dummy page, and rows past the last request's, are padding.
    req_pool_indices, seq_lens, extend_lens [B] int64: rows of the request table, tokens of the sequence with this
    step's, and this step's. Lengths of a request that is padding are of no matter.
    """

    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    extend_lens: torch.Tensor


def plan_step(
    step: StepRows,
    req_to_token: torch.Tensor,
    window_pages: torch.Tensor,
    max_len: int,
    window: int,
    rings: Mapping[int, int],
) -> CompressedPlan:
    """The plan of a step. It needs no entry of the request table for this step's own tokens.

    req_to_token [R, C] int32. window_pages [pages] int32: the page of the window's pools of each page of slots
    (``WindowPages.table``). max_len: no sequence is longer, in tokens. window: tokens of it, the row's own included.
    rings: rows of states for each page, by the ratios that the step's layers have.
    """
    rows = _Rows(step, req_to_token, window_pages)
    back = torch.arange(1 - window, 1, device=req_to_token.device)
    positions = rows.positions.unsqueeze(1) + back
    inside = (positions >= 0) & ~rows.padding.unsqueeze(1)
    slots = rows.window_slots(rows.requests.unsqueeze(1), positions)
    return CompressedPlan(
        requests=rows.requests,
        store_slots=rows.store_slots,
        window_slots=torch.where(inside, slots, -1).to(torch.int32),
        page_table=rows.page_table(-(-max_len // PAGE_SIZE)),
        entries={ratio: rows.entries(ratio, ring) for ratio, ring in rings.items()},
    )


class _Rows:
    """Positions and slots of the rows of a step."""

    def __init__(self, step: StepRows, req_to_token: torch.Tensor, window_pages: torch.Tensor) -> None:
        num_rows, num_requests = step.out_cache_loc.shape[0], step.seq_lens.shape[0]
        self.step, self.table, self.window_pages = step, req_to_token, window_pages
        self.index = torch.arange(num_rows, device=req_to_token.device)
        ends = step.extend_lens.cumsum(0)
        owner = torch.searchsorted(ends, self.index, right=True)
        self.padding = (owner >= num_requests) | (step.out_cache_loc < PAGE_SIZE)
        self.requests = owner.clamp(max=num_requests - 1)
        # By request: its first row, and the position of that row.
        self.first_row = ends - step.extend_lens
        self.start = step.seq_lens - step.extend_lens
        self.positions = self.start[self.requests] + self.index - self.first_row[self.requests]
        self.store_slots = torch.where(self.padding, 0, self._in_window(step.out_cache_loc))

    def slots(self, requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of positions of requests, int64; any where there is no such position."""
        start = self.start[requests]
        row = self.first_row[requests] + positions - start
        ours = self.step.out_cache_loc[row.clamp(0, self.index.shape[0] - 1)]
        column = positions.clamp(0, self.table.shape[1] - 1)
        theirs = self.table[self.step.req_pool_indices[requests], column].long()
        return torch.where(positions >= start, ours, theirs)

    def window_slots(self, requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of positions of requests in the window's pools, int64; any where there is no such position."""
        return self._in_window(self.slots(requests, positions))

    def _in_window(self, slots: torch.Tensor) -> torch.Tensor:
        return self.window_pages[slots // PAGE_SIZE].long() * PAGE_SIZE + slots % PAGE_SIZE

    def page_table(self, num_pages: int) -> torch.Tensor:
        """Pages [B, num_pages] int32 of each request."""
        first = torch.arange(num_pages, device=self.table.device) * PAGE_SIZE
        requests = torch.arange(self.start.shape[0], device=self.table.device).unsqueeze(1)
        pages = self.slots(requests, first.expand(requests.shape[0], -1)) // PAGE_SIZE
        return torch.where(first < self.step.seq_lens.unsqueeze(1), pages, 0).to(torch.int32)

    def entries(self, ratio: int, ring: int) -> EntryPlan:
        """What compressors of ``ratio`` do."""
        step, real = self.step, ~self.padding
        closing = self._closing(ratio)
        is_real, row = closing >= 0, closing.clamp(min=0)
        last, request = self.positions[row], self.requests[row]
        tokens = last.unsqueeze(1) + torch.arange(1 - ENTRY_TOKENS[ratio], 1, device=row.device)
        in_step = tokens >= self.start[request].unsqueeze(1)
        states = -2 - state_row(self.window_slots(request.unsqueeze(1), tokens), ring)
        sources = torch.where(in_step, row.unsqueeze(1) + tokens - last.unsqueeze(1), states)
        # A page keeps the last rows that it gets: an accepted length, or a prefix that ends with it, needs no others.
        page_end = (self.positions // PAGE_SIZE + 1) * PAGE_SIZE
        kept = self.positions >= torch.minimum(page_end, step.seq_lens[self.requests]) - ring
        return EntryPlan(
            visible=torch.where(real, (self.positions + 1) // ratio, 0).to(torch.int32),
            state_rows=torch.where(kept & real, state_row(self.store_slots, ring), 0),
            entry_rows=torch.where(is_real, step.out_cache_loc[row] // ratio, 0),
            first_positions=torch.where(is_real, last + 1 - ratio, 0),
            sources=torch.where(is_real.unsqueeze(1) & (tokens >= 0), sources, -1),
        )

    def _closing(self, ratio: int) -> torch.Tensor:
        """Rows [C] that close an entry, in order, then -1: C is as many as the step can close."""
        num_rows, num_requests = self.index.shape[0], self.start.shape[0]
        capacity = min(num_rows, num_rows // ratio + num_requests)
        closes = ((self.positions + 1) % ratio == 0) & ~self.padding
        place = torch.where(closes, closes.long().cumsum(0) - 1, capacity)
        rows = torch.full((capacity + 1,), -1, dtype=torch.int64, device=self.index.device)
        return rows.scatter_(0, place, torch.where(closes, self.index, -1))[:capacity]


def state_row(slots: torch.Tensor, ring: int) -> torch.Tensor:
    """Rows of slots in a pool of states with ``ring`` rows for each page."""
    return slots // PAGE_SIZE * ring + slots % ring
