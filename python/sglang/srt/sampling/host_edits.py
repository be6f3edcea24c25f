"""``LogitEdits`` of a host, which can look: one list of all ids that the batch edits, kept from step to step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.kernels.ops.sampling.draw import EDITED_FAULT
from sglang.kernels.ops.sampling.greedy import LOGITS_FAULT
from sglang.srt.sampling.logit_edits import SamplingRow

# Rows of the table.
_REPETITION, _MINUS, _BIAS, _COUNT = range(4)


@dataclass
class _Request:
    """What one request adds to each token that it outputs, and the ids that it may not output yet."""

    frequency: np.float32
    presence: np.float32
    repetition: np.float32
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
        repetitions = {float(request.repetition) for request in requests.values()} - {1.0}
        self._repeats, self._weakens = bool(repetitions), min(repetitions, default=1.0) >= 1.0
        self._biased = bool(table[_BIAS].any())
        self._hold(offsets, table)
        self._cut()

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
                frequency=np.float32(p.frequency_penalty),
                presence=np.float32(p.presence_penalty),
                repetition=np.float32(p.repetition_penalty),
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
        if logits.shape[1] != self._vocab_size:
            raise ValueError(f"edits are for {self._vocab_size} ids, but logits have {logits.shape[1]}")
        edited = logits.clone() if logits.dtype == torch.float32 else logits.float()
        x = edited.take(self._at)
        if self._repeats:
            divided, multiplied = x / self._repetition, x * self._repetition
            # From 1 on, the lesser of the two is what the sign asks for.
            x = torch.minimum(divided, multiplied) if self._weakens else torch.where(x > 0, divided, multiplied)
        x.sub_(self._minus)
        if self._biased:
            x.add_(self._bias)
        edited.put_(self._at, x)
        for row in self._forbidding:
            edited[row, self.requests[row].stops] = -math.inf
        return edited

    def judge(self, logits: torch.Tensor, faults: torch.Tensor) -> None:
        """Correct ``faults`` [B] int64 of what was drawn from ``apply(logits)``, in place: the model's come first."""
        told = faults.tolist()
        # Only where an id was forbidden may what is wrong with the logits have gone.
        for row in [row for row in self.requests if told[row] or row in self._forbidding]:
            sound = math.isfinite(float(logits[row].max()))
            faults[row] = LOGITS_FAULT if not sound else EDITED_FAULT if told[row] else 0

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
        table = self._table
        count: np.float32 = table[_COUNT, place] + np.float32(1.0)
        table[_COUNT, place] = count
        table[_REPETITION, place] = request.repetition
        table[_MINUS, place] = request.frequency * count + request.presence

    def _place(self, offset: int) -> int:
        """Where the entry of an offset is, which may be a new one; not of those that were new before."""
        place = bisect_left(self._offsets, offset, 0, self._num_sorted)
        if place < self._num_sorted and self._offsets[place] == offset:
            return place
        place, self._num = self._num, self._num + 1
        if place == len(self._offsets):
            more = place + 64
            self._hold(np.append(self._offsets, np.zeros(more, np.int64)), np.pad(self._table, ((0, 0), (0, more))))
        self._offsets[place] = offset
        return place

    def _hold(self, offsets: np.ndarray, table: np.ndarray) -> None:
        """Use arrays with room for more entries than there are."""
        self._offsets, self._table = offsets, table
        self._all_offsets, self._all_columns = torch.from_numpy(offsets), torch.from_numpy(table)

    def _cut(self) -> None:
        """Tensors of the entries that there are."""
        self._at = self._all_offsets.narrow(0, 0, self._num)
        self._repetition, self._minus, self._bias, _ = self._all_columns.narrow(1, 0, self._num).unbind()


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
    table[_REPETITION] = np.where(seen[ids], request.repetition, np.float32(1.0))
    table[_BIAS, np.searchsorted(ids, biased)] = list(row.params.logit_bias.values())
    drawn, times = np.unique(output, return_counts=True)
    places, counts = np.searchsorted(ids, drawn), times.astype(np.float32)
    table[_COUNT, places] = counts
    table[_MINUS, places] = request.frequency * counts + request.presence
    return ids, table
