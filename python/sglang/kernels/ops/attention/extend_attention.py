"""Causal attention of packed requests over the paged cache, keys and values or latent rows: prefill, with or without a
cached prefix."""

from __future__ import annotations

from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.extend_ragged import extend_ragged_torch
from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.ops.attention.launchers import caches_fit, launch_extend
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.spec import Impl, Op


def extend_attention_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, kv_slot_ids: Tensor, qo_indptr: Tensor, kv_indptr: Tensor,
    scale: float, rank: int = 0,
) -> Tensor:  # fmt: skip
    """Causal softmax attention, request by request, over cache slots.

    q [N, Hq, D], k_cache [S, Hk, D], v_cache [S, Hk, Dv]; kv_slot_ids [M] int64 lists the slots of each request's
    tokens in order, the new ones (already written) included, and maybe more; qo_indptr and kv_indptr [B+1] int64 cut
    q and kv_slot_ids by request. -> [N, Hq, Dv] in q's dtype. Without v_cache the values are the first ``rank`` columns
    of the keys: absorbed latent attention, where q is the query times W_UK, then the rotated part (DeepSeek-V2 report,
    section 2.1 and appendix C).
    """
    kv_slot_ids = kv_slot_ids[: int(kv_indptr[-1])]
    k = read_rows(k_cache, kv_slot_ids, q.dtype)
    v = k[..., :rank] if v_cache is None else read_rows(v_cache, kv_slot_ids, q.dtype)
    return extend_ragged_torch(q, k, v, qo_indptr, kv_indptr, scale)


def extend_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, kv_slot_ids: Tensor, qo_indptr: Tensor, kv_indptr: Tensor,
    scale: float, rank: int = 0,
) -> Tensor:  # fmt: skip
    shape, v = RowShape.of_caches(q, v_cache, rank), k_cache if v_cache is None else v_cache
    return launch_extend(q, k_cache, v, kv_slot_ids, qo_indptr, kv_indptr, scale, shape)[0]


def _accepts(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, qo: Tensor,
    kv: Tensor, scale: float, rank: int = 0,
) -> bool:  # fmt: skip
    return caches_fit(q, k_cache, v_cache, rank)


extend_attention = Op(
    "attention.extend_attention", triton_impl(extend_attention_triton, _accepts), Impl("torch", extend_attention_torch)
)
