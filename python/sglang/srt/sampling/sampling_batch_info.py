"""Sampling parameters of a batch as tensors, and the logit edits (penalties, biases, minimum length) they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang.srt.sampling.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """What one request contributes: its parameters, its seed, and the tokens that penalties count."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    # Ids that end this request; they are not drawn before ``min_new_tokens`` tokens exist.
    stop_ids: Sequence[int] = ()


@dataclass
class SamplingBatchInfo:
    """Per-row parameters of B requests; ``None`` for an edit that no row wants.

    temperatures [B, 1], top_ps, min_ps [B] or [B, 1] float32; top_ks [B] or [B, 1] integer, all ids where it is below
    1 or above the vocabulary size; sampling_seed [B] int64, random when None; greedy_rows [B] bool, those of top_ks 1
    when None; counts [B, V] float32, occurrences of each id in the output; seen [B, V] bool, ids in prompt or output;
    logit_bias [B, V] float32. The names are upstream's, whose callers build it by keywords; ``from_rows`` is ours.
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
    device: torch.device | str | None = None  # of the tensors; where penalties are moved to
    is_any_greedy: bool | None = None  # None: no row but where all are
    sampling_seed: torch.Tensor | None = None
    greedy_rows: torch.Tensor | None = None
    frequency_penalties: torch.Tensor | None = None  # [B, 1]
    presence_penalties: torch.Tensor | None = None  # [B, 1]
    repetition_penalties: torch.Tensor | None = None  # [B, 1]
    counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    # Host-side: tokens still missing to min_new_tokens, and the ids forbidden until then.
    min_tokens_left: list[int] = field(default_factory=list)
    stop_ids: list[Sequence[int]] = field(default_factory=list)

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
        if self.is_any_greedy and self.greedy_rows is None:
            self.greedy_rows = self.top_ks.squeeze(1) == 1

    @classmethod
    def from_rows(cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> SamplingBatchInfo:
        """Gather ``rows`` into tensors on ``device``; rebuilt whenever the batch's composition changes."""
        params = [row.params for row in rows]
        greedy = [p.is_greedy for p in params]

        def move(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            # Built on the host and copied without a wait: a step may be running.
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        def column(values: list[float]) -> torch.Tensor:
            return move(values, torch.float32).unsqueeze(1)

        for row in rows:
            if row.params.min_new_tokens:
                _require_ids("end-of-sequence ids and stop_token_ids", row.stop_ids, vocab_size)
            _require_ids("logit_bias", [int(key) for key in row.params.logit_bias], vocab_size)
        top_ks = [vocab_size if p.top_k == -1 else min(p.top_k, vocab_size) for p in params]
        left = [max(0, p.min_new_tokens - len(row.output_ids)) for p, row in zip(params, rows, strict=True)]
        info = cls(
            vocab_size=vocab_size,
            temperatures=column([1.0 if p.is_greedy else p.temperature for p in params]),
            top_ps=column([p.top_p for p in params]),
            top_ks=move(top_ks, torch.int64).unsqueeze(1),
            min_ps=column([p.min_p for p in params]),
            device=device,
            sampling_seed=move([row.seed for row in rows], torch.int64),
            greedy_rows=move(greedy, torch.bool),
            is_all_greedy=all(greedy),
            is_any_greedy=any(greedy),
            need_top_k_sampling=any(k < vocab_size for k, g in zip(top_ks, greedy, strict=True) if not g),
            need_top_p_sampling=any(p.top_p < 1.0 for p, g in zip(params, greedy, strict=True) if not g),
            need_min_p_sampling=any(p.min_p > 0.0 for p, g in zip(params, greedy, strict=True) if not g),
            min_tokens_left=left if any(left) else [],
            stop_ids=[row.stop_ids for row in rows] if any(left) else [],
        )
        if any(p.logit_bias for p in params):
            info.logit_bias = _bias_matrix(params, vocab_size, device)
        info._set_penalties(rows, column)
        return info

    def _set_penalties(self, rows: Sequence[SamplingRow], column: Callable[[list[float]], torch.Tensor]) -> None:
        params = [row.params for row in rows]
        if any(p.frequency_penalty or p.presence_penalty for p in params):
            self.frequency_penalties = column([p.frequency_penalty for p in params])
            self.presence_penalties = column([p.presence_penalty for p in params])
            self.counts = torch.stack([_count(row.output_ids, self.vocab_size) for row in rows]).to(self.device)
        if any(p.repetition_penalty != 1.0 for p in params):
            self.repetition_penalties = column([p.repetition_penalty for p in params])
            seen = [_count([*row.prompt_ids, *row.output_ids], self.vocab_size) > 0 for row in rows]
            self.seen = torch.stack(seen).to(self.device)

    def edits_logits(self) -> bool:
        """True when ``apply_edits`` would change anything."""
        edits = (self.counts, self.seen, self.logit_bias)
        return any(edit is not None for edit in edits) or any(self.min_tokens_left)

    def apply_edits(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties, bias and minimum length on a copy of ``logits`` [B, V] float32.

        Repetition: divide positive, multiply negative logits of seen ids (Keskar et al. 2019, CTRL). Frequency and
        presence: subtract ``frequency * count + presence * (count > 0)`` over the output (OpenAI's definition).
        """
        logits = logits.clone()
        if self.seen is not None:
            assert self.repetition_penalties is not None
            scaled = torch.where(logits > 0, logits / self.repetition_penalties, logits * self.repetition_penalties)
            logits = torch.where(self.seen, scaled, logits)
        if self.counts is not None:
            assert self.frequency_penalties is not None and self.presence_penalties is not None
            logits -= self.frequency_penalties * self.counts + self.presence_penalties * (self.counts > 0)
        if self.logit_bias is not None:
            logits += self.logit_bias
        for row, left in enumerate(self.min_tokens_left):
            if left > 0:
                logits[row, list(self.stop_ids[row])] = float("-inf")
        return logits

    def update(self, next_token_ids: torch.Tensor) -> None:
        """Count the tokens just drawn ([B] integer), in place."""
        ids = next_token_ids.to(torch.int64).unsqueeze(1)
        if self.counts is not None:
            self.counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
        if self.seen is not None:
            self.seen.scatter_(1, ids, True)
        if self.min_tokens_left:
            self.min_tokens_left = [max(0, left - 1) for left in self.min_tokens_left]


def _require_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"{name} must lie in [0, {vocab_size}), got {min(ids)} to {max(ids)}")


def _count(ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Occurrences of each id: [V] float32."""
    return torch.bincount(torch.tensor(list(ids), dtype=torch.int64), minlength=vocab_size).to(torch.float32)


def _bias_matrix(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> torch.Tensor:
    bias = torch.zeros(len(params), vocab_size)
    for row, p in enumerate(params):
        for key, value in p.logit_bias.items():
            bias[row, int(key)] = value
    return bias.to(device)
