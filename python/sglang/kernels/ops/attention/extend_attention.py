"""Causal attention of packed requests over the paged cache: prefill, with or without a cached prefix."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.extend_ragged import extend_ragged_torch, indptr, ragged_shapes
from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.ops.attention.launchers import launch_extend, rows_fit
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.spec import Case, Impl, Op


def extend_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slot_ids: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal softmax attention, request by request, over cache slots.

    q [N, Hq, D], k_cache [S, Hk, D], v_cache [S, Hk, Dv]; kv_slot_ids [M] int64 lists the slots of each request's
    tokens in order, the new ones (already written) included; qo_indptr and kv_indptr [B+1] int64 cut q and
    kv_slot_ids by request. -> [N, Hq, Dv] in q's dtype.
    """
    k, v = (read_rows(cache, kv_slot_ids, q.dtype) for cache in (k_cache, v_cache))
    return extend_ragged_torch(q, k, v, qo_indptr, kv_indptr, scale)


def extend_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slot_ids: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    shape = RowShape.of(q.shape[2], v_cache.shape[2])
    return launch_extend(q, k_cache, v_cache, kv_slot_ids, qo_indptr, kv_indptr, scale, shape)[0]


def _accepts(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: object) -> bool:
    return rows_fit(q, k_cache, v_cache)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, q_lens, kv_lens in ragged_shapes():
        for heads, kv_heads in ((2, 2), (4, 1)):
            slots = torch.randperm(sum(kv_lens) + 3, generator=generator)[: sum(kv_lens)]
            q = torch.randn(sum(q_lens), heads, 8, generator=generator)
            k_cache = torch.randn(sum(kv_lens) + 3, kv_heads, 8, generator=generator)
            v_cache = torch.randn(sum(kv_lens) + 3, kv_heads, 8, generator=generator)
            args = (q, k_cache, v_cache, slots, indptr(q_lens), indptr(kv_lens), 0.35)
            yield Case(f"{name}-{heads}x{kv_heads}", args)
        coarse = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
        yield Case(f"{name}-fp8", (q, *coarse, *args[3:]))


extend_attention = Op(
    "attention.extend_attention",
    triton_impl(extend_attention_triton, _accepts),
    Impl("torch", extend_attention_torch),
    cases=_cases,
)
