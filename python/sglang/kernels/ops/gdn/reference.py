"""What the torch reference of a gated delta net's steps is made of: convolution, gates, unit length, one recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, initial: Tensor, seq_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``y[t, c] = silu(sum_j weight[c, j] * x[t - W + 1 + j, c])`` within each sequence.

    x [N, C] holds B sequences one after the other, ``seq_lens`` their lengths on the host (zero is allowed), weight
    [C, W], initial [B, C, W-1] the raw columns before each sequence (oldest first; zeros at a start) -> y [N, C] in x's
    dtype and the columns to continue from, [B, C, W-1] in initial's dtype. Sums are float32.
    """
    history = weight.shape[1] - 1
    if not seq_lens:
        return torch.empty_like(x), initial.clone()
    pieces: list[Tensor] = []
    for before, own in zip(initial.transpose(1, 2).to(x.dtype), x.split(list(seq_lens)), strict=True):
        pieces += (before, own)
    padded = torch.cat(pieces).float()  # each sequence after its W-1 columns of history
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


def causal_conv1d_update(x: Tensor, weight: Tensor, state: Tensor, slot_ids: Tensor) -> Tensor:
    """One more token per row: the convolution's output, and the slot's columns moved on by one.

    x [B, C], weight [C, W], state [S, C, W-1] (rows ``slot_ids`` [B] int64 are overwritten) -> y [B, C] in x's dtype.
    Sums are float32. Rows that share a slot leave either one's columns in it (padding rows share slot 0).
    """
    window = torch.cat((state.index_select(0, slot_ids).to(x.dtype), x.unsqueeze(-1)), dim=-1)
    state.index_copy_(0, slot_ids, window[..., 1:].to(state.dtype))
    return F.silu((window.float() * weight.float()).sum(-1)).to(x.dtype)


def gdn_gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``.

    a, b [N, HV] float, A_log, dt_bias [HV] -> g (log decay, at most 0) and beta, both [N, HV] float32. softplus takes
    its linear branch above 20. Yang et al. 2024 (Gated Delta Networks), the Mamba-2 parametrisation of the decay.
    """
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def l2_norm(x: Tensor) -> Tensor:
    """x [..., D] float -> float32 ``x * rsqrt(sum(x^2) + 1e-6)`` over the last dimension; zero rows stay zero."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slot_ids: Tensor, scale: float
) -> Tensor:
    """``S <- exp(g) S; d = beta (v - S k); S <- S + d k^T; o = scale * S q`` with the updated state S [V, K].

    q, k [B, HK, K] (unit length), v [B, HV, V], g, beta [B, HV] float32, state [S, HV, V, K] (rows ``slot_ids`` [B]
    int64 are overwritten) -> o [B, HV, V] in v's dtype. Value head j reads key head ``j // (HV / HK)``. Computed in
    float32, stored in the state's dtype. Yang et al. 2024 (Gated Delta Networks), eq. 10. Rows that share a slot leave
    either one's state in it (padding rows share slot 0).
    """
    states = state.index_select(0, slot_ids).float()
    out = delta_step(states, scale, q.float(), k.float(), v, g.exp(), beta)
    state.index_copy_(0, slot_ids, states.to(state.dtype))
    return out.to(v.dtype)


def delta_step(states: Tensor, scale: float, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The rule above on ``states`` [B, HV, V, K] in place, all float32; decay [B, HV] is exp(g) -> o [B, HV, V]."""
    rows, key_heads, k_dim = k.shape
    value_heads, v_dim = v.shape[1:]
    per_key = value_heads // key_heads
    decay = decay.unsqueeze(-1)
    grouped = states.view(rows, key_heads, per_key * v_dim, k_dim)
    # One pass over the states reads both S k and S q; the second needs only a correction for what is written.
    reads = torch.stack((k, q), dim=-2) @ grouped.transpose(-1, -2)
    seen, answered = reads.view(rows, key_heads, 2, per_key, v_dim).unbind(2)
    delta = beta.unsqueeze(-1) * (v.float() - decay * seen.reshape(v.shape))
    overlap = (k * q).sum(-1, keepdim=True).repeat_interleave(per_key, dim=1)
    out = (decay * answered.reshape(v.shape)).addcmul_(delta, overlap).mul_(scale)
    states.mul_(decay.unsqueeze(-1))
    grouped.addcmul_(delta.view(rows, key_heads, per_key * v_dim, 1), k.unsqueeze(2))
    return out
