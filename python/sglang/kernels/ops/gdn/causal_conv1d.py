"""Depthwise causal convolution with SiLU over packed sequences, and its one-token step on slot-indexed columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from sglang.kernels.spec import Case, Impl, Op


def causal_conv1d_torch(
    x: torch.Tensor, weight: torch.Tensor, initial: torch.Tensor, seq_lens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y[t, c] = silu(sum_j weight[c, j] * x[t - W + 1 + j, c])`` within each sequence.

    x [N, C] holds B sequences one after the other, ``seq_lens`` their lengths on the host (zero is allowed), weight
    [C, W], initial [B, C, W-1] the raw columns before each sequence (oldest first; zeros at a start) -> y [N, C] in x's
    dtype and the columns to continue from, [B, C, W-1] in initial's dtype. Sums are float32.
    """
    history = weight.shape[1] - 1
    if not seq_lens:
        return torch.empty_like(x), initial.clone()
    pieces: list[torch.Tensor] = []
    for before, own in zip(initial.transpose(1, 2).to(x.dtype), x.split(list(seq_lens)), strict=True):
        pieces += (before, own)
    padded = torch.cat(pieces).float()  # each sequence behind its W-1 columns of history
    taps = weight.float().t()
    summed = padded[: padded.shape[0] - history] * taps[0]
    for j in range(1, history + 1):
        summed.addcmul_(padded[j : j + summed.shape[0]], taps[j])
    ends, rows, end = [], [], 0
    for length in seq_lens:
        rows.append(torch.arange(end, end + length, device=x.device))
        end += length + history
        ends.append(end)
    # Rows between two sequences mix both and are dropped; one sequence alone has none.
    kept = summed if len(seq_lens) == 1 else summed.index_select(0, torch.cat(rows))
    final = torch.stack([padded[end - history : end] for end in ends]).transpose(1, 2)
    return F.silu(kept).to(x.dtype), final.to(initial.dtype)


def causal_conv1d_update_torch(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slot_ids: torch.Tensor
) -> torch.Tensor:
    """One more token a row: the convolution's output, and the slot's columns moved on by one.

    x [B, C], weight [C, W], state [S, C, W-1] (rows ``slot_ids`` [B] int64 are overwritten) -> y [B, C] in x's dtype.
    Sums are float32. Rows that share a slot leave either one's columns in it (padding rows share slot 0).
    """
    window = torch.cat((state.index_select(0, slot_ids).to(x.dtype), x.unsqueeze(-1)), dim=-1)
    state.index_copy_(0, slot_ids, window[..., 1:].to(state.dtype))
    return F.silu((window.float() * weight.float()).sum(-1)).to(x.dtype)


def _prefill_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for seq_lens in ((1,), (2, 3), (1, 64, 2), (0, 5), (130, 1), ()):
        x = torch.randn(sum(seq_lens), 24, generator=generator)
        initial = torch.randn(len(seq_lens), 24, 3, generator=generator)
        weight = torch.randn(24, 4, generator=generator)
        yield Case("+".join(map(str, seq_lens)) or "empty", (x, weight, initial, list(seq_lens)))
    yield Case("width-2", (torch.randn(5, 8), torch.randn(8, 2), torch.zeros(1, 8, 1), [5]))


def _update_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 5):
        state = torch.randn(9, 24, 3, generator=generator)
        slot_ids = torch.randperm(9, generator=generator)[:rows]
        x = torch.randn(rows, 24, generator=generator)
        yield Case(f"{rows}-rows", (x, torch.randn(24, 4, generator=generator), state, slot_ids))


causal_conv1d = Op("gdn.causal_conv1d", Impl("torch", causal_conv1d_torch), cases=_prefill_cases)
causal_conv1d_update = Op("gdn.causal_conv1d_update", Impl("torch", causal_conv1d_update_torch), cases=_update_cases)
