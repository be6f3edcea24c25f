"""Rows in and out of the paged cache: writes at slot ids, and the slots of spans of the request table."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl, warps_for
from sglang.kernels.ops.quant.group_fp8 import FP8_DTYPES, fp8_dtype
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform


def _bits(rows: Tensor) -> Tensor:
    """8-bit rows as integers: torch moves those on every device."""
    return rows.view(torch.uint8) if rows.dtype in FP8_DTYPES else rows


def read_rows(cache: Tensor, slot_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of cache [S, ...] at slot_ids [M] int64, converted to ``dtype``."""
    return _bits(cache).index_select(0, slot_ids).view(cache.dtype).to(dtype)


def _write_rows(cache: Tensor, slot_ids: Tensor, rows: Tensor) -> Tensor:
    if cache.dtype in FP8_DTYPES:
        largest = torch.finfo(cache.dtype).max
        rows = rows.clamp(-largest, largest)
    _bits(cache).index_copy_(0, slot_ids, _bits(rows.to(cache.dtype)))
    return cache


def is_cache_dtype(cache_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels convert between rows of ``dtype`` and a cache of ``cache_dtype``, in both
    directions."""
    return dtype in FLOATS and (cache_dtype in FLOATS or cache_dtype == fp8_dtype(current_platform.arch))


def write_kv_torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Write one row of keys and values per token, converted to the cache's dtype; returns the caches.

    What an 8-bit float cannot hold becomes its largest number of that sign; NaN stays NaN.
    k [N, H, D], v [N, H, Dv], k_cache [S, H, D] and v_cache [S, H, Dv] with dense rows, slot_ids [N] int64 in [0, S).
    Slot 0 may repeat (padding) and holds any of its rows then; other slots differ.
    """
    return _write_rows(k_cache, slot_ids, k), _write_rows(v_cache, slot_ids, v)


def write_latent_torch(latent: Tensor, cache: Tensor, slot_ids: Tensor) -> Tensor:
    """Write one latent row per token: latent [N, R+P], cache [S, R+P]; otherwise as ``write_kv_torch``."""
    return _write_rows(cache, slot_ids, latent)


def gather_slots_torch(
    req_to_token: Tensor, req_pool_indices: Tensor, starts: Tensor, indptr: Tensor, num_slots: int
) -> Tensor:
    """Slots of a span of each request, packed by request.

    req_to_token [R, C] int32, req_pool_indices [B] int64 rows of it, starts [B] int64 the first position of each span,
    indptr [B+1] int64 where each span goes, num_slots its last entry, or more than that -> [num_slots] int64, of which
    those past the spans are undefined.
    """
    # What is left belongs to nobody, and is read from the last request.
    lengths = torch.cat((indptr.diff(), num_slots - indptr[-1:]))
    request = torch.repeat_interleave(lengths, output_size=num_slots).clamp(max=req_pool_indices.shape[0] - 1)
    position = torch.arange(num_slots, device=indptr.device) - indptr[request] + starts[request]
    return req_to_token[req_pool_indices[request], position.clamp(max=req_to_token.shape[1] - 1)].long()


def write_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
    from sglang.kernels.ops.attention.kv_cache_triton import write_rows_kernel

    num_tokens, heads, dim = k.shape
    value = v.shape[2]
    if num_tokens:
        block = next_power_of_2(max(heads * dim, heads * value))
        write_rows_kernel[(num_tokens, 2)](
            k, v, k_cache, v_cache, slot_ids,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(0), v_cache.stride(0),
            K_DIM=dim, V_DIM=value, K_WIDTH=heads * dim, V_WIDTH=heads * value, BLOCK=block,
            num_warps=warps_for(block),
        )  # fmt: skip
    return k_cache, v_cache


def gather_slots_triton(
    req_to_token: Tensor, req_pool_indices: Tensor, starts: Tensor, indptr: Tensor, num_slots: int
) -> Tensor:
    from sglang.kernels.ops.attention.kv_cache_triton import gather_slots_kernel

    out = torch.empty(num_slots, dtype=torch.int64, device=req_to_token.device)
    batch = req_pool_indices.shape[0]
    if num_slots:
        # The longest span is not known here: each request has programs for its share, and each walks its span.
        programs = max(1, cdiv(64, batch))
        gather_slots_kernel[(batch, programs)](
            req_to_token, req_pool_indices, starts, indptr, out, req_to_token.stride(0),
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out


def _accepts_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_ids: Tensor) -> bool:
    dense = all(tensor.stride(2) == 1 for tensor in (k, v))
    packed = all(cache.stride(1) == cache.shape[2] and cache.stride(2) == 1 for cache in (k_cache, v_cache))
    same = k.dtype == v.dtype and k_cache.dtype == v_cache.dtype
    return same and is_cache_dtype(k_cache.dtype, k.dtype) and dense and packed


def _accepts_table(req_to_token: Tensor, *rest: object) -> bool:
    return req_to_token.stride(1) == 1


write_kv = Op("kv_cache.write_kv", triton_impl(write_kv_triton, _accepts_kv), Impl("torch", write_kv_torch))
gather_slots = Op(
    "kv_cache.gather_slots", triton_impl(gather_slots_triton, _accepts_table), Impl("torch", gather_slots_torch)
)
