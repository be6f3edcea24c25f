"""Exact verification: the target draws its own token at each row, and drafts count while they equal it."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


def num_new_tokens(drawn: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """How many of the drawn tokens [B, W] stand behind accepted drafts [B, W - 1]: [B] int64 in 1..W.

    Row j of a request was computed behind its first j drafts, so its token is the target's own as long as these drafts
    are what the target drew. A draw depends on seed and position alone (see ``sampling.seeded``), so the tokens are
    those of decoding one by one, at any temperature.
    """
    return (drawn[:, :-1] == drafts).long().cumprod(1).sum(1) + 1


def along_path(info: SamplingBatchInfo, drafts: torch.Tensor) -> SamplingBatchInfo:
    """``info`` of B requests for the B * W rows of a verify step with ``drafts`` [B, W - 1].

    Row j of a request is edited as if its first j drafts had been output.
    """
    size, width = drafts.shape[0], drafts.shape[1] + 1

    def rows(column: torch.Tensor | None) -> torch.Tensor | None:
        return None if column is None else column.repeat_interleave(width, dim=0)

    counts, seen = rows(info.counts), rows(info.seen)
    for j in range(width - 1):
        behind = drafts[:, j].view(size, 1, 1).expand(size, width - 1 - j, 1)
        if counts is not None:
            part = counts.view(size, width, -1)[:, j + 1 :]
            part.scatter_add_(2, behind, torch.ones_like(behind, dtype=counts.dtype))
        if seen is not None:
            seen.view(size, width, -1)[:, j + 1 :].scatter_(2, behind, True)
    names = (
        "temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "greedy_rows", "frequency_penalties",
        "presence_penalties", "repetition_penalties", "logit_bias",
    )  # fmt: skip
    return replace(
        info,
        **{name: rows(getattr(info, name)) for name in names},
        counts=counts,
        seen=seen,
        min_tokens_left=[max(0, left - j) for left in info.min_tokens_left for j in range(width)],
        stop_ids=[ids for ids in info.stop_ids for _ in range(width)],
    )
