"""Normed, partly rotated attention heads from their projections to queries and cache rows, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, triton_impl, warps_for
from sglang.kernels.ops.attention.kv_cache import is_cache_dtype, write_kv_torch
from sglang.kernels.ops.norm.rmsnorm import rms_norm_torch, rows_per_program
from sglang.kernels.ops.rope.rotary import rotary_torch
from sglang.kernels.spec import Impl, Op

# The widest head that one program holds.
MAX_TRITON_DIM = 512


def prepare_gqa_torch(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, cos_sin_cache: Tensor,
    k_cache: Tensor, v_cache: Tensor, slot_ids: Tensor, eps: float, is_neox: bool,
) -> Tensor:  # fmt: skip
    """Norm each head of q and k (gain 1 + weight), rotate its first P columns, and write k and v as cache rows.

    q [N, Hq, D], k [N, Hk, D], v [N, Hk, Dv], q_weight and k_weight [D], positions [N], cos_sin_cache [max, P], k_cache
    [S, Hk, D], v_cache [S, Hk, Dv], slot_ids [N] int64 in [0, S) -> new queries [N, Hq, D]. Rounds where
    ``norm.rms_norm``, ``rope.rotary`` and ``kv_cache.write_kv`` do.
    """
    normed_q, normed_k = rms_norm_torch(q, q_weight, eps, True), rms_norm_torch(k, k_weight, eps, True)
    queries, keys = rotary_torch(positions, normed_q, normed_k, cos_sin_cache, is_neox)
    write_kv_torch(keys, v, k_cache, v_cache, slot_ids)
    return queries


def prepare_gqa_triton(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, cos_sin_cache: Tensor,
    k_cache: Tensor, v_cache: Tensor, slot_ids: Tensor, eps: float, is_neox: bool,
) -> Tensor:  # fmt: skip
    from sglang.kernels.ops.attention.prepare_triton import prepare_gqa_kernel

    (tokens, heads, dim), (kv_heads, value_dim) = q.shape, v.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        half, width = cos_sin_cache.shape[1] // 2, next_power_of_2(dim)
        # The tile and the warps of norm.rms_norm, so that both sum a row in one order.
        rows = rows_per_program(dim)
        q_blocks, k_blocks = cdiv(heads, rows), cdiv(kv_heads, rows)
        prepare_gqa_kernel[(tokens * (q_blocks + 2 * k_blocks),)](
            q, k, v, q_weight, k_weight, positions, cos_sin_cache, out, k_cache, v_cache, slot_ids,
            heads, kv_heads, dim, value_dim, eps, q_blocks, k_blocks,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_cache.stride(0), v_cache.stride(0), cos_sin_cache.stride(0),
            HALF=half, IS_NEOX=is_neox, HEADS=rows, PAIRS=next_power_of_2(half), DIM=width,
            VALUE=next_power_of_2(value_dim), num_warps=warps_for(rows * width), **early_start(),
        )  # fmt: skip
    return out


def _accepts(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor,
    positions: Tensor, cos_sin_cache: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_ids: Tensor, *rest: object,
) -> bool:  # fmt: skip
    dense = all(tensor.stride(-1) == 1 for tensor in (q, k, v, cos_sin_cache))
    packed = all(cache.stride(1) == cache.shape[2] and cache.stride(2) == 1 for cache in (k_cache, v_cache))
    flat = all(tensor.is_contiguous() for tensor in (positions, slot_ids, q_weight, k_weight))
    same = q.dtype == k.dtype == v.dtype == q_weight.dtype == k_weight.dtype and k_cache.dtype == v_cache.dtype
    fits = q.dtype in FLOATS and max(q.shape[2], v.shape[2]) <= MAX_TRITON_DIM
    return dense and packed and flat and same and fits and is_cache_dtype(k_cache.dtype, q.dtype)


prepare_gqa = Op("prepare.gqa", triton_impl(prepare_gqa_triton, _accepts), Impl("torch", prepare_gqa_torch))
