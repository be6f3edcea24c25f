"""Log-probabilities of a step's rows: computed on the device, read on the host when the step's result is processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch

TopLogprobs = list[tuple[float, int]]


@dataclass(frozen=True)
class HostLogprobs:
    """Per row: the log-probability of its token, its most likely (log-probability, id) pairs, best first, and the
    pairs of the ids that were chosen, in their order. ``top`` and ``chosen`` are empty if no row requested them."""

    token: list[float]
    top: list[TopLogprobs]
    chosen: list[TopLogprobs]


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities of R rows on the device; the host knows how many each row requested.

    token [R] float32 is that of one id per row. ``top`` are values [R, K] and ids [R, K] of the K most likely ids, of
    which row i wants the first ``top_counts[i]``. ``chosen`` [M] are those of the ids ``chosen_ids[0]``, then
    ``chosen_ids[1]``, and so on. ``top`` and ``chosen`` are None if no row requested them.
    """

    token: torch.Tensor
    top: tuple[torch.Tensor, torch.Tensor] | None = None
    top_counts: Sequence[int] = ()
    chosen: torch.Tensor | None = None
    chosen_ids: Sequence[Sequence[int]] = ()

    def tensors(self) -> list[torch.Tensor]:
        """All that must reach the host."""
        return [t for t in (self.token, *(self.top or ()), self.chosen) if t is not None]

    def read(self, host: Sequence[torch.Tensor]) -> HostLogprobs:
        """Lists of what arrived: ``host`` are copies of ``tensors()`` on the host, of any shape and number type."""
        rest = [tensor.flatten() for tensor in host]
        token, top, chosen = rest.pop(0).tolist(), list[TopLogprobs](), list[TopLogprobs]()
        if self.top is not None:
            shape = self.top[0].shape
            values, ids = rest.pop(0).view(shape).tolist(), rest.pop(0).view(shape).long().tolist()
            for row_values, row_ids, count in zip(values, ids, self.top_counts, strict=True):
                top.append(list(zip(row_values[:count], row_ids[:count], strict=True)))
        if self.chosen is not None:
            each = iter(rest.pop(0).tolist())
            chosen = [[(next(each), token_id) for token_id in ids] for ids in self.chosen_ids]
        return HostLogprobs(token, top, chosen)


def best_entries(logprobs: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values and ids [R, K] of the best entries of ``logprobs`` [R, V], K the largest count; None where all are 0."""
    if not any(counts):
        return None
    values, ids = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1)
    return values, ids


class ChosenIds:
    """The ids chosen per row, as an index on the device: created again only when they change, so that a decode step of
    the same requests copies nothing."""

    def __init__(self) -> None:
        self._ids: list[tuple[int, ...]] = []
        self._index: torch.Tensor | None = None  # rows and ids [2, M] int64

    def entries(self, logprobs: torch.Tensor, ids: Sequence[Sequence[int] | None]) -> torch.Tensor | None:
        """From ``logprobs`` [R, V], the entries ``ids[0]`` of row 0, then those of row 1, ...: [M]; None for none."""
        wanted = [tuple(row or ()) for row in ids]
        if not any(wanted):
            return None
        if self._index is None or self._ids != wanted or self._index.device != logprobs.device:
            rows = chain.from_iterable(repeat(row, len(chosen)) for row, chosen in enumerate(wanted))
            pairs = [list(rows), list(chain.from_iterable(wanted))]
            host = torch.tensor(pairs, dtype=torch.int64, pin_memory=logprobs.device.type == "cuda")
            self._ids, self._index = wanted, host.to(logprobs.device, non_blocking=True)
        return logprobs[self._index[0], self._index[1]]
