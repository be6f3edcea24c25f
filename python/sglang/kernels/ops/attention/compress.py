"""Entries of compressed attention: tokens pooled to one row, normed and rotated; and what later entries need."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import next_power_of_2, triton_impl, warps_for
from sglang.kernels.ops.attention.packed_rows import RowLayout, is_packed, store_rows_torch
from sglang.kernels.spec import Impl, Op

# Bytes of float32 that a reference gathers at once.
GATHER_BYTES = 1 << 26


def compress_torch(
    kv: Tensor, gate: Tensor, kv_states: Tensor, gate_states: Tensor, state_rows: Tensor, sources: Tensor,
    position_bias: Tensor, norm_weight: Tensor, eps: float, cos_sin_cache: Tensor, first_positions: Tensor,
    entry_rows: Tensor, cache: Tensor, cache_scales: Tensor | None = None, rows_apart: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Store an entry for each row of ``sources``, then this step's rows as states: (cache, kv_states, gate_states).

    kv, gate [N, parts*D] of this step's rows; kv_states, gate_states [S, parts*D] float32. sources [C, W] int64 with
    W = parts*m: j >= 0 row j of the step, -2 - s row s of the states as they are before the step, -1 none. Of W tokens
    the first m give their first D columns and the last m their last D. position_bias [m, parts*D] float32 adds to a
    token's gate by its place in its window; softmax over the W tokens per channel weights them (DeepSeek-V4 report,
    section 2.3). Then RMS norm by norm_weight [D], and the last R columns are turned in pairs (2i, 2i+1) by the row
    first_positions [C] of cos_sin_cache [P, R]; all in float32. Entries go to rows entry_rows [C] int64 of cache
    [E, D], with scales as ``store_rows_torch`` has it, states to state_rows [N] int64. Row 0 may repeat and holds any
    of its rows; an entry of no tokens is 0. rows_apart: no entry reads a state that the step writes, as where each
    request brings one row; then both may be done at once.
    """
    dim = norm_weight.shape[0]
    step = max(1, GATHER_BYTES // (4 * sources.shape[1] * dim))
    for start in range(0, sources.shape[0], step):
        part = slice(start, start + step)
        pooled = _pool(kv, gate, kv_states, gate_states, sources[part], position_bias, dim)
        entries = _norm_and_turn(pooled, norm_weight, eps, cos_sin_cache[first_positions[part]])
        store_rows_torch(entries, entry_rows[part], cache, cache_scales)
    kv_states.index_copy_(0, state_rows, kv.float())
    gate_states.index_copy_(0, state_rows, gate.float())
    return cache, kv_states, gate_states


def _pool(
    kv: Tensor, gate: Tensor, kv_states: Tensor, gate_states: Tensor, sources: Tensor,
    position_bias: Tensor, dim: int,
) -> Tensor:  # fmt: skip
    """The weighted sums [C, D] float32."""
    ratio, parts = position_bias.shape[0], position_bias.shape[1] // dim
    values, gates = [], []
    for number in range(parts):
        columns = slice(number * dim, (number + 1) * dim)
        tokens = sources[:, number * ratio : (number + 1) * ratio]
        there = (tokens != -1).unsqueeze(2)
        bias = position_bias[:, columns].float()
        values.append(torch.where(there, _gather(kv[:, columns], kv_states[:, columns], tokens), 0.0))
        found = _gather(gate[:, columns], gate_states[:, columns], tokens) + bias
        gates.append(torch.where(there, found, -torch.inf))
    nothing = (sources == -1).all(dim=1)[:, None, None]
    weights = torch.where(nothing, 0.0, torch.cat(gates, dim=1)).softmax(dim=1)
    return (weights * torch.cat(values, dim=1)).sum(dim=1)


def _gather(rows: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
    """Rows [C, W, D] float32 of the step or of the states; any where a token is -1."""
    of_step = rows[tokens.clamp(min=0)].float()
    return torch.where((tokens >= 0).unsqueeze(2), of_step, states[(-2 - tokens).clamp(min=0)])


def _norm_and_turn(x: Tensor, weight: Tensor, eps: float, cos_sin: Tensor) -> Tensor:
    """x [C, D] float32 -> the same."""
    x = weight.float() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))
    plain, turned = x.split([x.shape[1] - cos_sin.shape[1], cos_sin.shape[1]], dim=1)
    cos, sin = cos_sin.float().chunk(2, dim=1)
    first, second = turned[:, ::2], turned[:, 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2)
    return torch.cat((plain, pairs.flatten(1)), dim=1)


def compress_triton(
    kv: Tensor, gate: Tensor, kv_states: Tensor, gate_states: Tensor, state_rows: Tensor, sources: Tensor,
    position_bias: Tensor, norm_weight: Tensor, eps: float, cos_sin_cache: Tensor, first_positions: Tensor,
    entry_rows: Tensor, cache: Tensor, cache_scales: Tensor | None = None, rows_apart: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch, or two where states may be read and written."""
    from sglang.kernels.ops.attention.compress_triton import compress_kernel

    (count, tokens), num_rows, dim = sources.shape, kv.shape[0], norm_weight.shape[0]
    block = next_power_of_2(dim)
    # Programs from the first on: entries come before rows.
    parts = ((0, count + num_rows),) if rows_apart else ((0, count), (count, num_rows))
    for first, programs in parts:
        if programs:
            compress_kernel[(programs,)](
                kv, gate, kv_states, gate_states, state_rows, sources, position_bias, norm_weight, cos_sin_cache,
                first_positions, entry_rows, cache, cache if cache_scales is None else cache_scales,
                eps, first, count, kv.stride(0), gate.stride(0), kv_states.stride(0), gate_states.stride(0),
                cos_sin_cache.stride(0), cache.stride(0), 0 if cache_scales is None else cache_scales.stride(0),
                **RowLayout.of(cache, cache_scales).constants(), DIM=dim, BLOCK=block,
                TOKENS=tokens, RATIO=position_bias.shape[0], ROTARY=cos_sin_cache.shape[1],
                STEP=min(8, next_power_of_2(tokens)), BLOCK_W=next_power_of_2(kv.shape[1]),
                num_warps=warps_for(8 * block),
            )  # fmt: skip
    return cache, kv_states, gate_states


def _accepts(
    kv: Tensor, gate: Tensor, kv_states: Tensor, gate_states: Tensor, state_rows: Tensor, sources: Tensor,
    position_bias: Tensor, norm_weight: Tensor, eps: float, cos_sin_cache: Tensor, first_positions: Tensor,
    entry_rows: Tensor, cache: Tensor, cache_scales: Tensor | None = None, rows_apart: bool = False,
) -> bool:  # fmt: skip
    rows = (kv, gate, kv_states, gate_states, position_bias, cos_sin_cache)
    dense = all(x.stride(1) == 1 for x in rows) and sources.is_contiguous() and position_bias.is_contiguous()
    even = norm_weight.shape[0] % 2 == 0
    return dense and even and kv.dtype == gate.dtype and is_packed(cache, cache_scales, kv.dtype)


compress = Op("compressed.compress", triton_impl(compress_triton, _accepts), Impl("torch", compress_torch))
