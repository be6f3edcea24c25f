"""``LogitEdits`` of a host, which can look: one list of all ids that the batch edits, kept from step to step.

A forward evicts other code from the caches: the first call of an operation that it does not use takes four times
as long as one of its own. Edits are made with the latter, and Python alone counts the tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sglang.kernels.ops.sampling.draw import EDITED_FAULT
from sglang.kernels.ops.sampling.greedy import LOGITS_FAULT
from sglang.srt.sampling.logit_edits import SamplingRow

# Rows of the table.
_REPETITION, _MINUS, _BIAS, _COUNT = range(4)
# Room for ids that are not edited yet.
_SPARE = 64


@dataclass
class _Request:
    """What one request adds to each token that it outputs, and the ids that it may not output yet."""

    frequency: float  # these are float32
    presence: float
    repetition: float
    counts: bool
    left: int
    stops: list[int]


class HostEdits:
    """Edits of the requests that have any, by the same rule as ``edit_logits_torch``; the others cost nothing.

    requests: by their row of the batch. offsets [K] int64: row * vocab_size + id of each entry, rising; table [4, K]
    float32: repetition penalty (1 where the id is in neither prompt nor output), what frequency and presence penalties
    subtract, bias, and the count in the output.
    """

    def __init__(
        self, vocab_size: int, requests: Mapping[int, _Request], offsets: np.ndarray, table: np.ndarray
    ) -> None:
        self._vocab_size = vocab_size
        self.requests = requests
        self._forbidding = {row for row, request in requests.items() if request.left > 0}
        # The first are in order; where a later one is, and one that was looked up, the dictionary knows.
        self._num_sorted = self._num = len(offsets)
        self._places: dict[int, int] = {}
        self._repeats = any(request.repetition != 1.0 for request in requests.values())
        self._biased = bool(table[_BIAS].any())
        self._hold(offsets, table)

    @classmethod
    def from_rows(cls, rows: Mapping[int, SamplingRow], vocab_size: int) -> HostEdits:
        """Those of ``rows``, by their row of the batch, each with an edit."""
        requests: dict[int, _Request] = {}
        offsets: list[np.ndarray] = []
        tables: list[np.ndarray] = []
        for number, row in rows.items():
            p, start = row.params, number * vocab_size
            stops = sorted({*row.stop_ids}) if row.tokens_left else []
            requests[number] = _Request(
                frequency=float(np.float32(p.frequency_penalty)),
                presence=float(np.float32(p.presence_penalty)),
                repetition=float(np.float32(p.repetition_penalty)),
                counts=p.counts_tokens,
                left=row.tokens_left,
                stops=stops,
            )
            ids, table = _entries(row, requests[number], vocab_size)
            offsets.append(ids + start)
            tables.append(table)
        return cls(vocab_size, requests, np.concatenate(offsets), np.concatenate(tables, axis=1))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Edited logits [B, V] float32."""
        edited = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._edit(edited)
        for row in self._forbidding:
            edited[row, self.requests[row].stops] = -math.inf
        return edited

    def drawn(
        self, logits: torch.Tensor, draw: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``draw`` makes of edited logits: ids and faults [B] int64, of which the model's come first.

        ``logits`` [B, V] may be edited until then, and are as before at the end.
        """
        if self._forbidding or logits.dtype != torch.float32 or not logits.is_contiguous():
            ids, faults = draw(self.apply(logits))
        else:
            before = self._edit(logits)
            ids, faults = draw(logits)
            logits.view(-1).index_copy_(0, self._at, before)
        self._correct_faults(logits, faults)
        return ids, faults

    def _edit(self, logits: torch.Tensor) -> torch.Tensor:
        """Edit contiguous float32 logits in place, except forbidden ids; returns what was at the offsets before."""
        if logits.shape[1] != self._vocab_size:
            raise ValueError(f"edits are for {self._vocab_size} ids, but logits have {logits.shape[1]}")
        flat = logits.view(-1)
        before = x = flat.index_select(0, self._at)
        if self._repeats:
            x = torch.where(x < 0, x * self._repetition, x / self._repetition)
        x = x.add(self._minus, alpha=-1)
        if self._biased:
            x = x + self._bias
        flat.index_copy_(0, self._at, x)
        return before

    def _correct_faults(self, logits: torch.Tensor, faults: torch.Tensor) -> None:
        """Correct ``faults`` [B] int64 of what was drawn from edited ``logits``, in place: the model's come first."""
        found = faults.tolist()
        # Only where an id was forbidden may what is wrong with the logits have gone.
        for row in [row for row in self.requests if found[row] or row in self._forbidding]:
            sound = math.isfinite(float(logits[row].max()))
            faults[row] = LOGITS_FAULT if not sound else EDITED_FAULT if found[row] else 0

    def count(self, ids: torch.Tensor) -> None:
        """One more token of each request, ``ids`` [B] int64, in place."""
        drawn, before = ids.tolist(), self._num
        for row, request in self.requests.items():
            if request.counts:
                self._add(row, request, drawn[row])
            if request.left > 0:
                request.left -= 1
                if not request.left:
                    self._forbidding.remove(row)
        if self._num > before:
            self._cut()

    def along_path(self, drafts: torch.Tensor) -> HostEdits:
        """For B * W rows with ``drafts`` [B, W - 1] int64: row j of a request as if its first j drafts were output."""
        width, guesses = drafts.shape[1] + 1, drafts.tolist()
        offsets, vocab = self._offsets[: self._num], self._vocab_size
        firsts = offsets + offsets // vocab * ((width - 1) * vocab)
        offsets = (firsts + np.arange(0, width * vocab, vocab).reshape(-1, 1)).flatten()
        order = np.argsort(offsets, kind="stable")  # of runs that are in order
        requests = {
            row * width + j: replace(request, left=request.left - j)
            for row, request in self.requests.items()
            for j in range(width)
        }
        wide = HostEdits(vocab, requests, offsets[order], np.tile(self._table[:, : self._num], width)[:, order])
        for row, request in requests.items():
            if request.counts:
                for token_id in guesses[row // width][: row % width]:
                    wide._add(row, request, token_id)
        wide._cut()
        return wide

    def _add(self, row: int, request: _Request, token_id: int) -> None:
        """Count a token of a request; the tensors do not see a new entry before ``_cut``."""
        offset = row * self._vocab_size + token_id
        place = self._places.get(offset)
        if place is None:
            place = self._places[offset] = self._place(offset)
        _, repetitions, minus, _, counts = self._memory
        counts[place] += 1.0
        repetitions[place] = request.repetition
        # Each result is rounded to float32 where it is put.
        minus[place] = request.frequency * counts[place]
        minus[place] += request.presence

    def _place(self, offset: int) -> int:
        """Where the entry of an offset is, which may be a new one; not of those that were new before."""
        offsets = self._memory[0]
        place = bisect_left(offsets, offset, 0, self._num_sorted)
        if place < self._num_sorted and offsets[place] == offset:
            return place
        place, self._num = self._num, self._num + 1
        if place == len(self._offsets):
            self._hold(self._offsets, self._table)
        self._memory[0][place] = offset
        return place

    def _hold(self, offsets: np.ndarray, table: np.ndarray) -> None:
        """Use copies with room for more entries."""
        more = len(offsets) + _SPARE
        self._offsets = np.concatenate((offsets, np.zeros(more, np.int64)))
        self._table = np.concatenate((table, np.zeros((4, more), np.float32)), axis=1)
        arrays = (self._offsets, *self._table)
        self._tensors = [torch.from_numpy(array) for array in arrays]
        self._memory: list[Any] = [memoryview(array) for array in arrays]
        self._cut()

    def _cut(self) -> None:
        """Tensors of the entries that there are."""
        num = self._num
        self._at, self._repetition, self._minus, self._bias = (each[:num] for each in self._tensors[:4])


def _entries(row: SamplingRow, request: _Request, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of one request's entries, rising, and their table."""
    output = np.array(row.output_ids if request.counts else (), np.int64)
    biased = np.array([int(key) for key in row.params.logit_bias], np.int64)
    seen: np.ndarray = np.zeros(vocab_size, np.bool_)
    seen[output] = True
    if request.counts:
        seen[np.array(row.prompt_ids, np.int64)] = True
    listed = seen.copy()
    listed[biased] = True
    ids = np.flatnonzero(listed)
    table: np.ndarray = np.zeros((4, len(ids)), np.float32)
    table[_REPETITION] = np.where(seen[ids], np.float32(request.repetition), np.float32(1.0))
    table[_BIAS, np.searchsorted(ids, biased)] = list(row.params.logit_bias.values())
    drawn, times = np.unique(output, return_counts=True)
    places, counts = np.searchsorted(ids, drawn), times.astype(np.float32)
    table[_COUNT, places] = counts
    table[_MINUS, places] = np.float32(request.frequency) * counts + np.float32(request.presence)
    return ids, table
