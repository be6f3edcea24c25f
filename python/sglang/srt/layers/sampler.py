"""From logits to token ids: edits, greedy or seeded choice, log-probabilities of what was chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sglang.kernels.ops.sampling.greedy import fits_aiter, greedy_aiter, greedy_sample, greedy_torch
from sglang.kernels.ops.sampling.seeded import seeded_sample
from sglang.srt.distributed import get_tp_group, is_dp_attention_enabled
from sglang.srt.layers.logits_processor import LogitsProcessorOutput, RowFault
from sglang.srt.layers.logprobs import ChosenIds, RowLogprobs, best_entries
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import get_global_server_args

# The last three are not used here: AITER's registered test replaces them by these names, beside the two below.
__all__ = ["Sampler", "filtered_probs", "get_global_server_args", "get_tp_group", "is_dp_attention_enabled"]

# True and a kernel, or False, go past the op table; None leaves the choice to it (SGLANG_USE_AITER, HIP, shapes).
_use_aiter: bool | None = None
_aiter_greedy_sample: Callable[[torch.Tensor, torch.Tensor], None] | None = None


class Sampler(torch.nn.Module):
    """Chooses the next token of each row.

    A row from which nothing can be sampled gets a ``RowFault`` in ``logits_output.row_faults``: its logits, or those
    that it is drawn from, hold NaN, +inf or nothing finite, or the kernel's answer is no token id. An id in range then
    stands in its place for the device's sake, and the scheduler ends that request with an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._chosen = ChosenIds()

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool = False,
        top_logprobs_nums: Sequence[int] = (),
        token_ids_logprobs: Sequence[Sequence[int] | None] = (),
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``next_token_ids`` [B] from ``logits_output.next_token_logits`` [B, V] float; int64, AITER's are int32.

        ``positions`` [B] int64 is the index in its sequence of the token to be drawn; needed unless all rows are
        greedy. With ``return_logprob`` the output's ``row_logprobs`` are natural-log probabilities under the model's
        own distribution (before penalties and temperature). Nothing here waits for the device.
        """
        raw = logits_output.next_token_logits
        logits = sampling_info.apply_edits(raw) if sampling_info.edits_logits() else raw
        if sampling_info.is_all_greedy:
            ids, drawn_from = _greedy(logits), logits
        else:
            assert positions is not None, "random sampling needs positions"
            ids, drawn_from = self._sample(logits, sampling_info, positions)
        bounded = ids.clamp(0, raw.shape[-1] - 1)
        logits_output.row_faults = _row_faults(raw, drawn_from, ids != bounded)
        ids = bounded
        if return_logprob:
            logprobs = torch.log_softmax(raw.float(), dim=-1)
            logits_output.row_logprobs = RowLogprobs(
                token=logprobs.gather(1, ids.to(torch.int64).unsqueeze(1)).squeeze(1),
                top=best_entries(logprobs, top_logprobs_nums),
                top_counts=top_logprobs_nums,
                chosen=self._chosen.entries(logprobs, token_ids_logprobs),
                chosen_ids=[row or () for row in token_ids_logprobs],
            )
        return ids

    @staticmethod
    def _sample(
        logits: torch.Tensor, info: SamplingBatchInfo, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B] int64, not bounded, and the scaled logits [B, V] that they are drawn from (greedy rows: scale 1)."""
        assert info.sampling_seed is not None
        scaled = logits / info.temperatures
        drawn = seeded_sample(_filter(torch.softmax(scaled, dim=-1), info), info.sampling_seed, positions)
        if info.is_any_greedy:
            assert info.greedy_rows is not None
            drawn = torch.where(info.greedy_rows, _greedy(logits).to(drawn.dtype), drawn)
        return drawn, scaled


def _row_faults(raw: torch.Tensor, drawn_from: torch.Tensor, bad_ids: torch.Tensor) -> torch.Tensor:
    """A RowFault or 0 for each row: [B] int64."""
    # NaN and infinities alike are not below infinity; cheaper than torch.isfinite.
    faults = bad_ids * int(RowFault.TOKEN_ID)
    if drawn_from is not raw:
        faults = torch.where(drawn_from.amax(dim=-1).abs() < math.inf, faults, int(RowFault.EDITED))
    return torch.where(raw.amax(dim=-1).abs() < math.inf, faults, int(RowFault.LOGITS))


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    if _use_aiter is None:
        return greedy_sample(logits)
    return greedy_aiter(logits, _aiter_greedy_sample) if _use_aiter and fits_aiter(logits) else greedy_torch(logits)


def filtered_probs(logits: torch.Tensor, info: SamplingBatchInfo) -> torch.Tensor:
    """Probabilities [B, V] after temperature, then top-k, then top-p, then min-p; removed ids get 0.

    Top-k and top-p keep the most probable ids, ties in id order; top-p keeps the shortest such list whose sum reaches
    p (after top-k and renormalised); min-p drops ids below ``min_p * max``. Rows are not renormalised at the end.
    """
    return _filter(torch.softmax(logits / info.temperatures, dim=-1), info)


def _filter(probs: torch.Tensor, info: SamplingBatchInfo) -> torch.Tensor:
    if info.need_top_k_sampling or info.need_top_p_sampling:
        ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        if info.need_top_k_sampling:
            ranks = torch.arange(ordered.shape[1], device=ordered.device)
            ordered = ordered.masked_fill(ranks >= info.top_ks, 0.0)
        if info.need_top_p_sampling:
            share = ordered / ordered.sum(dim=-1, keepdim=True)
            before = share.cumsum(dim=-1) - share
            ordered = ordered.masked_fill((before >= info.top_ps) & (info.top_ps < 1.0), 0.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    if info.need_min_p_sampling:
        probs = probs.masked_fill(probs < info.min_ps * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs
