"""One token of the gated delta rule for each row, on states that live in slots."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.spec import Case, Impl, Op


def recurrent_gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slot_ids: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``S <- exp(g) S; d = beta (v - S k); S <- S + d k^T; o = scale * S q`` with the updated state S [V, K].

    q, k [B, HK, K] (unit length), v [B, HV, V], g, beta [B, HV] float32, state [S, HV, V, K] (rows ``slot_ids`` [B]
    int64 are overwritten) -> o [B, HV, V] in v's dtype. Value head j reads key head ``j // (HV / HK)``. Computed in
    float32, stored in the state's dtype. Yang et al. 2024 (Gated Delta Networks), eq. 10. Rows that share a slot leave
    either one's state in it (padding rows share slot 0).
    """
    rows, key_heads, k_dim = k.shape
    value_heads, v_dim = v.shape[1:]
    per_key = value_heads // key_heads
    decay = g.exp().unsqueeze(-1)
    k, q = k.float(), q.float()
    states = state.index_select(0, slot_ids).float()
    grouped = states.view(rows, key_heads, per_key * v_dim, k_dim)
    # One pass over the states reads both S k and S q; the second needs only a correction for what is written.
    reads = torch.stack((k, q), dim=-2) @ grouped.transpose(-1, -2)
    seen, answered = reads.view(rows, key_heads, 2, per_key, v_dim).unbind(2)
    delta = beta.unsqueeze(-1) * (v.float() - decay * seen.reshape(v.shape))
    overlap = (k * q).sum(-1, keepdim=True).repeat_interleave(per_key, dim=1)
    out = (decay * answered.reshape(v.shape)).addcmul_(delta, overlap).mul_(scale)
    states.mul_(decay.unsqueeze(-1))
    grouped.addcmul_(delta.view(rows, key_heads, per_key * v_dim, 1), k.unsqueeze(2))
    state.index_copy_(0, slot_ids, states.to(state.dtype))
    return out.to(v.dtype)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 1, 8, 8), (5, 2, 2, 32, 32), (3, 2, 3, 32, 48), (0, 2, 2, 8, 8))
    for rows, key_heads, per_key, k_dim, v_dim in shapes:
        heads = key_heads * per_key
        q, k = torch.nn.functional.normalize(torch.randn(2, rows, key_heads, k_dim, generator=generator), dim=-1)
        v = torch.randn(rows, heads, v_dim, generator=generator)
        g = -torch.rand(rows, heads, generator=generator) * 4
        beta = torch.rand(rows, heads, generator=generator)
        state = torch.randn(rows + 2, heads, v_dim, k_dim, generator=generator)
        slot_ids = torch.randperm(rows + 2, generator=generator)[:rows]
        yield Case(f"{rows}x{heads}x{v_dim}x{k_dim}", (q, k, v, g, beta, state, slot_ids, k_dim**-0.5))


recurrent_gated_delta_rule = Op(
    "gdn.recurrent_gated_delta_rule", Impl("torch", recurrent_gated_delta_rule_torch), cases=_cases
)
