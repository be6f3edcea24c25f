"""From hidden rows to logits: the last row of each request, and log-probabilities of prompt tokens when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import nn

from sglang.srt.layers.logprobs import RowLogprobs, best_entries
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Bound on prompt logits held at once, in elements.
_BLOCK_LOGITS = 1 << 25


class RowFault(IntEnum):
    """Why no token can be sampled from a row; the first reason that applies. 0: the row is sound."""

    # The model's logits contain NaN or +inf, or none is finite: the step of this request is faulty.
    LOGITS = 1
    # The model's logits are sound, but not with the request's own penalties, bias, forbidden ids and temperature.
    EDITED = 2
    # A kernel returned an id outside the vocabulary.
    TOKEN_ID = 3


@dataclass
class LogitsProcessorOutput:
    """Logits of the step, and the requested log-probabilities of prompt tokens.

    next_token_logits [B, V] float, as the head computes them. ``prompt_logprobs`` are blocks of scored prompt rows,
    each with the index of its request, in the order of the rows.
    """

    next_token_logits: torch.Tensor
    prompt_logprobs: list[tuple[int, RowLogprobs]] = field(default_factory=list)
    # Filled by the sampler: a RowFault or 0 for each row [B] int64, and the requested log-probabilities of the sampled
    # tokens.
    row_faults: torch.Tensor | None = None
    row_logprobs: RowLogprobs | None = None

    # The rows before the head, or those that they were computed from, [N, H], if the step wants them.
    hidden_states: torch.Tensor | None = None

    def first(self, num_rows: int) -> LogitsProcessorOutput:
        """The output of the first rows of a step in which every row has logits."""
        hidden = None if self.hidden_states is None else self.hidden_states[:num_rows]
        return replace(self, next_token_logits=self.next_token_logits[:num_rows], hidden_states=hidden)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the forward computed, before sampling."""
        return tuple(t for t in (self.next_token_logits, self.hidden_states) if t is not None)


class LogitsProcessor(nn.Module):
    """Picks the rows whose logits are needed and projects only those."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(
        self, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """hidden [N, H] after the final norm, lm_head [n, H] -> [n, V] float; returns logits of the wanted rows."""
        wanted = hidden if forward_batch.logits_rows is None else hidden.index_select(0, forward_batch.logits_rows)
        out = LogitsProcessorOutput(lm_head(wanted), hidden_states=hidden if forward_batch.wants_hidden else None)
        starts = forward_batch.extend_start_loc_cpu
        if starts is not None and any(
            entry is not None and entry.input_start is not None for entry in forward_batch.logprobs
        ):
            self._score_prompts(out, hidden, lm_head, forward_batch, starts)
        return out

    def _score_prompts(
        self,
        out: LogitsProcessorOutput,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        forward_batch: ForwardBatch,
        starts: list[int],
    ) -> None:
        assert forward_batch.prompt_targets is not None
        targets, chosen = forward_batch.prompt_targets, forward_batch.prompt_chosen
        block = max(1, _BLOCK_LOGITS // self.vocab_size)
        for index, (start, wanted) in enumerate(zip(starts, forward_batch.logprobs, strict=True)):
            if wanted is None or wanted.input_start is None:
                continue
            first, num_rows = start + wanted.input_start, len(wanted.input_target_ids)
            own, targets = targets[:num_rows], targets[num_rows:]
            picked: torch.Tensor | None = None
            if wanted.token_ids:
                assert chosen is not None
                picked, chosen = chosen[: len(wanted.token_ids)], chosen[len(wanted.token_ids) :]
            for begin in range(0, num_rows, block):
                part = own[begin : begin + block]
                size = part.shape[0]
                logprobs = lm_head(hidden[first + begin : first + begin + size]).log_softmax(-1, dtype=torch.float32)
                scored = RowLogprobs(
                    token=logprobs.gather(1, part.unsqueeze(1)).squeeze(1),
                    top=best_entries(logprobs, [wanted.top_k] * size),
                    top_counts=[wanted.top_k] * size,
                    chosen=None if picked is None else logprobs.index_select(1, picked),
                    chosen_ids=[wanted.token_ids] * size,
                )
                out.prompt_logprobs.append((index, scored))
