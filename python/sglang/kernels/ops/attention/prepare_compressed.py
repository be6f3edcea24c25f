"""Compressed attention from its projections to queries and cache rows: norms, rotation and the write, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.attention.packed_rows import RowLayout, is_packed, store_rows_torch
from sglang.kernels.ops.rope.rotary_tail import rotary_tail_torch
from sglang.kernels.spec import Impl, Op

# Numbers of query heads that a program holds.
NUMBERS_PER_PROGRAM = 4096


def prepare_compressed_torch(
    q: Tensor, kv: Tensor, positions: Tensor, cos_sin_cache: Tensor, norm_weight: Tensor, eps: float, row_ids: Tensor,
    cache: Tensor, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm each head of q without a weight and turn it; norm kv by ``norm_weight``, turn it, and store it as rows.

    q [N, H, D], kv [N, D], positions [N] int64, cos_sin_cache [P, R] float32 turns the last R columns as in
    ``rope.rotary_tail``; norm_weight [D] float32; rows go to row_ids [N] int64 of a cache as ``store_rows_torch`` has
    it. All in float32, rounded once. -> the queries [N, H, D] in q's dtype. DeepSeek-V4 report, section 2.3.
    """
    wide, rows = q.float(), kv.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    rows = norm_weight * (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps))
    store_rows_torch(rotary_tail_torch(rows.unsqueeze(1), positions, cos_sin_cache).squeeze(1), row_ids, cache, scales)
    return rotary_tail_torch(wide, positions, cos_sin_cache).to(q.dtype)


def prepare_compressed_triton(
    q: Tensor, kv: Tensor, positions: Tensor, cos_sin_cache: Tensor, norm_weight: Tensor, eps: float, row_ids: Tensor,
    cache: Tensor, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from sglang.kernels.ops.attention.prepare_compressed_triton import prepare_compressed_kernel

    num_rows, heads, dim = q.shape
    out = torch.empty(num_rows, heads, dim, dtype=q.dtype, device=q.device)
    if num_rows:
        block = next_power_of_2(dim)
        of_program = max(1, min(NUMBERS_PER_PROGRAM // block, next_power_of_2(heads)))
        prepare_compressed_kernel[(num_rows, cdiv(heads, of_program) + 1)](
            q, kv, positions, cos_sin_cache, norm_weight, row_ids, cache, cache if scales is None else scales, out,
            eps, heads, q.stride(0), q.stride(1), kv.stride(0), cos_sin_cache.stride(0), cache.stride(0),
            0 if scales is None else scales.stride(0), **RowLayout.of(cache, scales).constants(),
            DIM=dim, ROTARY=cos_sin_cache.shape[1], BLOCK=block, HEADS=of_program, num_warps=4,
        )  # fmt: skip
    return out


def _accepts(
    q: Tensor, kv: Tensor, positions: Tensor, cos_sin_cache: Tensor, norm_weight: Tensor, eps: float, row_ids: Tensor,
    cache: Tensor, scales: Tensor | None = None,
) -> bool:  # fmt: skip
    dense = q.stride(2) == kv.stride(1) == cos_sin_cache.stride(1) == 1
    same = q.dtype == kv.dtype and q.dtype in FLOATS and q.shape[2] % 2 == 0 and q.shape[2] <= NUMBERS_PER_PROGRAM
    return dense and same and is_packed(cache, scales, q.dtype)


prepare_compressed = Op(
    "compressed.prepare", triton_impl(prepare_compressed_triton, _accepts), Impl("torch", prepare_compressed_torch)
)
