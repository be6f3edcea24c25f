"""What requests change about their own logits, as tensors: penalties, biases, stop ids forbidden for a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.kernels.ops.sampling.draw import SEEN, STOP, edit_logits_torch
from sglang.srt.sampling.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """What one request contributes: its parameters, its seed, and the tokens that penalties count."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # Ids that end this request; they are not sampled before ``min_new_tokens`` tokens exist.
    stop_ids: Sequence[int] = ()

    @property
    def tokens_left(self) -> int:
        """Tokens still missing to ``min_new_tokens``."""
        return max(0, self.params.min_new_tokens - len(self.output_ids))

    @property
    def is_edited(self) -> bool:
        """Whether the request changes its logits."""
        return self.params.edits_logits or self.tokens_left > 0


@dataclass(frozen=True)
class LogitEdits:
    """Edits of the P requests that have any; the others cost nothing.

    rows [B] int32: the request among the P, -1 for none; requests [P] int64: the first row of each; marks [P, V] int32,
    penalties [P, 3], left [P] int32 and bias [P, V] as ``edit_logits_torch`` says. The sampling code counts each token
    it samples.
    """

    rows: torch.Tensor
    requests: torch.Tensor
    marks: torch.Tensor
    penalties: torch.Tensor
    left: torch.Tensor
    bias: torch.Tensor | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Edited logits [B, V] float32."""
        return edit_logits_torch(logits, self.rows, self.marks, self.penalties, self.left, self.bias)

    def count(self, ids: torch.Tensor) -> None:
        """One more token of each request, ``ids`` [B] int64, in place and without a wait."""
        drawn = ids.index_select(0, self.requests).unsqueeze(1)
        _count(self.marks, drawn)
        self.left.sub_(1)

    def along_path(self, drafts: torch.Tensor) -> LogitEdits:
        """For B * W rows with ``drafts`` [B, W - 1] int64: row j of a request as if its first j drafts were output."""
        width = drafts.shape[1] + 1
        index = torch.arange(width, dtype=torch.int32, device=drafts.device)
        rows = self.rows.unsqueeze(1)
        marks = self.marks.repeat_interleave(width, dim=0)
        behind = drafts.index_select(0, self.requests)
        by_row = marks.view(len(self.requests), width, -1)
        for j in range(width - 1):
            _count(by_row[:, j + 1 :], behind[:, j].view(-1, 1, 1).expand(-1, width - 1 - j, 1))
        return replace(
            self,
            rows=torch.where(rows < 0, -1, rows * width + index).flatten(),
            requests=(self.requests.unsqueeze(1) * width + index).flatten(),
            marks=marks,
            penalties=self.penalties.repeat_interleave(width, dim=0),
            left=(self.left.unsqueeze(1) - index).flatten(),
            bias=None if self.bias is None else self.bias.repeat_interleave(width, dim=0),
        )


def _count(marks: torch.Tensor, ids: torch.Tensor) -> None:
    """Add one token to ``marks`` [..., V] at ``ids`` [..., 1]."""
    marks.scatter_(-1, ids, (marks.gather(-1, ids) + 1) | SEEN)


class EditColumns:
    """The host's part of ``LogitEdits``: small columns for the batch's one copy, and the tensors made from them."""

    def __init__(self, rows: Sequence[SamplingRow], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.edited = [index for index, row in enumerate(rows) if row.is_edited]
        self.rows = [rows[index] for index in self.edited]
        self.batch_size = len(rows)
        for row in self.rows:
            if row.params.min_new_tokens:
                _require_ids("end-of-sequence ids and stop_token_ids", row.stop_ids, vocab_size)
            _require_ids("logit_bias", [int(key) for key in row.params.logit_bias], vocab_size)

    def columns(self) -> dict[str, np.ndarray]:
        """int32, float32 and int64 columns; where ids are marked as offsets into [P * V]."""
        params = [row.params for row in self.rows]
        numbers: np.ndarray = np.full(self.batch_size, -1, np.int32)
        numbers[self.edited] = np.arange(len(self.edited))
        penalties = [(p.frequency_penalty, p.presence_penalty, p.repetition_penalty) for p in params]
        found = {
            "edit_rows": numbers,
            "requests": np.array(self.edited, np.int64),
            "penalties": np.array(penalties, np.float32).flatten(),
            "left": np.array([row.tokens_left for row in self.rows], np.int32),
            "seen": self._offsets(
                [[*r.prompt_ids, *r.output_ids] if r.params.counts_tokens else () for r in self.rows]
            ),
            "output": self._offsets([r.output_ids if r.params.counts_tokens else () for r in self.rows]),
            "stop": self._offsets([sorted({*r.stop_ids}) if r.tokens_left else () for r in self.rows]),
        }
        if any(p.logit_bias for p in params):
            found["biased"] = self._offsets([[int(key) for key in p.logit_bias] for p in params])
            found["bias"] = np.array([value for p in params for value in p.logit_bias.values()], np.float32)
        return found

    def _offsets(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        parts = [np.asarray(row, np.int64) + index * self.vocab_size for index, row in enumerate(ids)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def build(self, parts: dict[str, torch.Tensor]) -> LogitEdits:
        """The tensors, from the columns on the device."""
        size, device = len(self.edited), parts["left"].device
        marks = torch.zeros(size * self.vocab_size, dtype=torch.int32, device=device)
        marks.index_fill_(0, parts["seen"], SEEN)
        marks.scatter_add_(0, parts["output"], torch.ones_like(parts["output"], dtype=torch.int32))
        marks.scatter_add_(0, parts["stop"], torch.full_like(parts["stop"], STOP, dtype=torch.int32))
        bias: torch.Tensor | None = None
        if "bias" in parts:
            bias = torch.zeros(size * self.vocab_size, device=device)
            bias = bias.scatter_(0, parts["biased"], parts["bias"]).view(size, self.vocab_size)
        return LogitEdits(
            rows=parts["edit_rows"],
            requests=parts["requests"],
            marks=marks.view(size, self.vocab_size),
            penalties=parts["penalties"].view(size, 3),
            left=parts["left"],
            bias=bias,
        )


def _require_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"{name} must lie in [0, {vocab_size}), got {min(ids)} to {max(ids)}")
