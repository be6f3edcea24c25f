"""Sampling parameters of a batch as tensors, and the logit edits (penalties, biases, minimum length) they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from sglang.kernels.ops.sampling.draw import Wanted
from sglang.srt.sampling.host_edits import HostEdits
from sglang.srt.sampling.logit_edits import EditColumns, LogitEdits, SamplingRow

__all__ = ["SamplingBatchInfo", "SamplingRow"]


@dataclass
class SamplingBatchInfo:
    """Per-row parameters of B requests.

    temperatures [B, 1], top_ps, min_ps [B] or [B, 1] float32; top_ks [B] or [B, 1] integer, all ids where it is below
    1 or above the vocabulary size; sampling_seed [B] int64, random when None; greedy_rows [B] bool, those of top_ks 1
    when None; vocab_mask [B, ceil(V / 32)] int32, the ids that may be sampled (bit i % 32 of word i // 32), None for
    all. The names are upstream's, whose callers build it by keywords; ``from_rows`` and ``edits`` are ours.
    """

    temperatures: torch.Tensor
    top_ps: torch.Tensor
    top_ks: torch.Tensor
    min_ps: torch.Tensor
    is_all_greedy: bool
    need_top_p_sampling: bool
    need_top_k_sampling: bool
    need_min_p_sampling: bool
    vocab_size: int
    device: torch.device | str | None = None  # of the tensors
    is_any_greedy: bool | None = None  # None: no row but where all are
    sampling_seed: torch.Tensor | None = None
    greedy_rows: torch.Tensor | None = None
    vocab_mask: torch.Tensor | None = None
    edits: LogitEdits | HostEdits | None = None

    def __post_init__(self) -> None:
        self.device = torch.device(self.device or self.temperatures.device)
        if self.is_any_greedy is None:
            self.is_any_greedy = self.is_all_greedy
        if self.top_ps.dim() == 1:
            self.top_ps, self.min_ps = self.top_ps.unsqueeze(1), self.min_ps.unsqueeze(1)
        if self.top_ks.dim() == 1:
            self.top_ks = self.top_ks.unsqueeze(1)
            self.top_ks = self.top_ks.masked_fill(self.top_ks < 1, self.vocab_size)
        if self.is_all_greedy:
            return
        if self.sampling_seed is None:
            shape = (self.temperatures.shape[0],)
            self.sampling_seed = torch.randint(2**62, shape, device=self.device)
        if self.greedy_rows is None:
            self.greedy_rows = (self.top_ks.squeeze(1) == 1) & self.is_any_greedy
            self.temperatures = self.temperatures.masked_fill(self.greedy_rows.unsqueeze(1), 1.0)

    @classmethod
    def from_rows(cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> SamplingBatchInfo:
        """Gather ``rows`` into tensors on ``device`` by one copy; rebuilt whenever the batch's composition changes."""
        params = [row.params for row in rows]
        greedy = [p.is_greedy for p in params]
        drawn = [p for p in params if not p.is_greedy]
        top_ks = [vocab_size if p.top_k == -1 else min(p.top_k, vocab_size) for p in params]
        edits, device = EditColumns(rows, vocab_size), torch.device(device)
        on_host = device.type == "cpu"
        columns = {
            "temperatures": np.array([1.0 if p.is_greedy else p.temperature for p in params], np.float32),
            "top_ps": np.array([p.top_p for p in params], np.float32),
            "min_ps": np.array([p.min_p for p in params], np.float32),
            "top_ks": np.array(top_ks, np.int64),
            "seeds": np.array([row.seed for row in rows], np.int64),
            "greedy": np.array(greedy, np.bool_),
        }
        parts = _to_device(columns | (edits.columns() if edits.edited and not on_host else {}), device)
        edited: LogitEdits | HostEdits | None = None
        if edits.edited:
            by_row = dict(zip(edits.edited, edits.rows, strict=True))
            edited = HostEdits.from_rows(by_row, vocab_size) if on_host else edits.build(parts)
        return cls(
            vocab_size=vocab_size,
            temperatures=parts["temperatures"].unsqueeze(1),
            top_ps=parts["top_ps"].unsqueeze(1),
            top_ks=parts["top_ks"].unsqueeze(1),
            min_ps=parts["min_ps"].unsqueeze(1),
            device=device,
            sampling_seed=parts["seeds"],
            greedy_rows=parts["greedy"],
            is_all_greedy=all(greedy),
            is_any_greedy=any(greedy),
            need_top_k_sampling=any(p.top_k != -1 and p.top_k < vocab_size for p in drawn),
            need_top_p_sampling=any(p.top_p < 1.0 for p in drawn),
            need_min_p_sampling=any(p.min_p > 0.0 for p in drawn),
            edits=edited,
        )

    @property
    def wanted(self) -> Wanted:
        """What the draw computes for this batch."""
        return Wanted(
            draws=not self.is_all_greedy,
            greedy=bool(self.is_any_greedy),
            top_k=self.need_top_k_sampling,
            top_p=self.need_top_p_sampling,
            min_p=self.need_min_p_sampling,
        )

    def edits_logits(self) -> bool:
        """True when ``apply_edits`` would change anything."""
        return self.edits is not None

    def apply_edits(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties, bias and minimum length on a copy of ``logits`` [B, V] float32."""
        assert self.edits is not None, "no row asks for an edit"
        return self.edits.apply(logits)

    def update(self, next_token_ids: torch.Tensor) -> None:
        """Count the tokens just sampled ([B] integer), in place."""
        if self.edits is not None:
            self.edits.count(next_token_ids.to(torch.int64))

    def along_path(self, drafts: torch.Tensor) -> SamplingBatchInfo:
        """The same for B * W rows with ``drafts`` [B, W - 1]: row j is edited as if its first j drafts were output.

        A ``vocab_mask`` is of these rows already: what a grammar allows after a draft is for its owner to say.
        """
        width = drafts.shape[1] + 1
        assert self.vocab_mask is None or self.vocab_mask.shape[0] == drafts.shape[0] * width

        def rows(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else column.repeat_interleave(width, dim=0)

        names = ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "greedy_rows")
        edits = None if self.edits is None else self.edits.along_path(drafts)
        repeated: dict[str, Any] = {name: rows(getattr(self, name)) for name in names}
        return replace(self, **repeated, edits=edits)


def _to_device(columns: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Host columns of any dtype on ``device``, by one copy for which nothing waits.

    Each begins at a multiple of 16 bytes, for which kernels are compiled whatever the number of requests.
    """
    starts = [0, *accumulate(-(-column.nbytes // 16) * 16 for column in columns.values())]
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, column in zip(starts, columns.values(), strict=False):
        host.numpy()[start : start + column.nbytes] = np.ascontiguousarray(column).view(np.uint8)
    packed = host if device.type == "cpu" else host.to(device, non_blocking=True)
    return {
        name: packed[start : start + column.nbytes].view(_DTYPES[column.dtype.name])
        for start, (name, column) in zip(starts, columns.items(), strict=False)
    }


_DTYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64, "bool": torch.bool}
