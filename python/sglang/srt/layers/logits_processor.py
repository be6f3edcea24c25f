"""From hidden rows to logits: the last row of each request, and log-probabilities of prompt tokens when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import nn

from sglang.srt.model_executor.forward_batch_info import ForwardBatch

TopLogprobs = list[tuple[float, int]]
# Bound on prompt logits held at once, in elements.
_BLOCK_LOGITS = 1 << 25


class RowFault(IntEnum):
    """Why nothing can be sampled from a row; the first that applies. 0 is a sound row."""

    # The model's logits hold NaN, +inf or nothing finite: what the step computed for the request is not sound.
    LOGITS = 1
    # The model's logits are sound, but not with the request's own penalties, bias, forbidden ids and temperature.
    EDITED = 2
    # A kernel answered an id outside the vocabulary.
    TOKEN_ID = 3


@dataclass
class LogitsProcessorOutput:
    """Logits of the step, and what was asked about prompt tokens.

    next_token_logits [B, V] float32. The lists hold one entry a request (empty when it asked nothing), each with one
    entry a scored prompt row: its token's log-probability, its most likely (log-probability, id) pairs, and the pairs
    of the chosen ids. They are None when no request asked.
    """

    next_token_logits: torch.Tensor
    input_token_logprobs: list[list[float]] | None = None
    input_top_logprobs: list[list[TopLogprobs]] | None = None
    input_token_ids_logprobs: list[list[TopLogprobs]] | None = None
    # Filled by the sampler: a RowFault or 0 for each row [B] int64, and what was asked about the drawn tokens [B].
    row_faults: torch.Tensor | None = None
    next_token_logprobs: torch.Tensor | None = None
    next_token_top_logprobs: list[TopLogprobs] | None = None
    next_token_token_ids_logprobs: list[TopLogprobs] | None = None

    # The rows that the head got, [N, H], where the step wants them.
    hidden_states: torch.Tensor | None = None

    def first(self, num_rows: int) -> LogitsProcessorOutput:
        """The output of the first rows of a step whose every row has logits."""
        hidden = None if self.hidden_states is None else self.hidden_states[:num_rows]
        return replace(self, next_token_logits=self.next_token_logits[:num_rows], hidden_states=hidden)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the forward computed, before sampling."""
        return tuple(t for t in (self.next_token_logits, self.hidden_states) if t is not None)

    @property
    def invalid_rows(self) -> torch.Tensor | None:
        """Rows from which nothing was sampled: [B] bool, None before sampling."""
        return None if self.row_faults is None else self.row_faults != 0


class LogitsProcessor(nn.Module):
    """Picks the rows whose logits are needed and projects only those."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(
        self, hidden: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], fb: ForwardBatch
    ) -> LogitsProcessorOutput:
        """hidden [N, H] after the final norm, lm_head [n, H] -> [n, V] float32; returns logits of the wanted rows."""
        wanted = hidden if fb.logits_rows is None else hidden.index_select(0, fb.logits_rows)
        out = LogitsProcessorOutput(lm_head(wanted), hidden_states=hidden if fb.wants_hidden else None)
        starts = fb.extend_start_loc_cpu
        if starts is not None and any(entry is not None and entry.input_start is not None for entry in fb.logprobs):
            self._score_prompts(out, hidden, lm_head, fb, starts)
        return out

    def _score_prompts(
        self,
        out: LogitsProcessorOutput,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        fb: ForwardBatch,
        starts: list[int],
    ) -> None:
        out.input_token_logprobs, out.input_top_logprobs, out.input_token_ids_logprobs = [], [], []
        block = max(1, _BLOCK_LOGITS // self.vocab_size)
        for start, wanted in zip(starts, fb.logprobs, strict=True):
            scored: list[float] = []
            top: list[TopLogprobs] = []
            chosen: list[TopLogprobs] = []
            if wanted is not None and wanted.input_start is not None:
                first, targets = start + wanted.input_start, wanted.input_target_ids
                for begin in range(0, len(targets), block):
                    part = targets[begin : begin + block]
                    rows = hidden[first + begin : first + begin + len(part)]
                    logprobs = lm_head(rows).log_softmax(-1)
                    target_ids = torch.tensor(part, device=rows.device).unsqueeze(1)
                    scored += logprobs.gather(1, target_ids).squeeze(1).tolist()
                    if wanted.top_k:
                        top += top_entries(logprobs, [wanted.top_k] * len(part))
                    if wanted.token_ids:
                        chosen += chosen_entries(logprobs, [wanted.token_ids] * len(part))
            out.input_token_logprobs.append(scored)
            out.input_top_logprobs.append(top)
            out.input_token_ids_logprobs.append(chosen)


def top_entries(logprobs: torch.Tensor, counts: Sequence[int]) -> list[TopLogprobs]:
    """For row i of ``logprobs`` [R, V], its ``counts[i]`` best (logprob, id) pairs, best first."""
    k = min(max(counts), logprobs.shape[1])
    values, ids = logprobs.topk(k, dim=-1)
    rows = zip(values.tolist(), ids.tolist(), counts, strict=True)
    return [list(zip(v[:count], i[:count], strict=True)) for v, i, count in rows]


def chosen_entries(logprobs: torch.Tensor, chosen: Sequence[Sequence[int]]) -> list[TopLogprobs]:
    """For row i of ``logprobs`` [R, V], the (logprob, id) pairs of the ids ``chosen[i]``, in that order."""
    return [
        list(zip(logprobs[row, list(ids)].tolist(), ids, strict=True)) if ids else [] for row, ids in enumerate(chosen)
    ]
