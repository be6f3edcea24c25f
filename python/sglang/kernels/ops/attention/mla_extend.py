"""Absorbed latent attention of packed requests over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.ragged_extend import indptr, ragged_extend_torch, ragged_shapes
from sglang.kernels.spec import Case, Impl, Op


def mla_extend_torch(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    kv_slot_ids: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """Causal softmax attention where all heads share one key row, whose first R columns are the value.

    q [N, H, R+P] (query times W_UK, then the rotated part), latent_cache [S, R+P], kv_slot_ids [M] int64 the slots of
    each request's tokens in order, the new ones included; qo_indptr and kv_indptr [B+1] int64 cut q and kv_slot_ids by
    request. -> [N, H, R] in q's dtype. DeepSeek-V2 report, section 2.1 and appendix C.
    """
    rows = latent_cache.index_select(0, kv_slot_ids).to(q.dtype).unsqueeze(1)
    return ragged_extend_torch(q, rows, rows[..., :kv_lora_rank], qo_indptr, kv_indptr, scale)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, q_lens, kv_lens in ragged_shapes():
        slots = torch.randperm(sum(kv_lens) + 3, generator=generator)[: sum(kv_lens)]
        q = torch.randn(sum(q_lens), 3, 20, generator=generator)
        cache = torch.randn(sum(kv_lens) + 3, 20, generator=generator)
        yield Case(name, (q, cache, slots, indptr(q_lens), indptr(kv_lens), 16, 0.2))


mla_extend = Op("attention.mla_extend", Impl("torch", mla_extend_torch), cases=_cases)
