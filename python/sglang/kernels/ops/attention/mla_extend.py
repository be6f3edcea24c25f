"""Absorbed latent attention of packed requests over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.extend_ragged import extend_ragged_torch, indptr, ragged_shapes
from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.ops.attention.launchers import latent_fits, launch_extend
from sglang.kernels.ops.attention.tiles import RowShape
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
    rows = read_rows(latent_cache, kv_slot_ids, q.dtype).unsqueeze(1)
    return extend_ragged_torch(q, rows, rows[..., :kv_lora_rank], qo_indptr, kv_indptr, scale)


def mla_extend_triton(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    kv_slot_ids: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    shape = RowShape.of(q.shape[2], kv_lora_rank, value_is_key=True)
    rows = latent_cache.unsqueeze(1)
    return launch_extend(q, rows, rows, kv_slot_ids, qo_indptr, kv_indptr, scale, shape)[0]


def _accepts(
    q: torch.Tensor, latent: torch.Tensor, slots: torch.Tensor, qo: torch.Tensor, kv: torch.Tensor, rank: int,
    scale: float,
) -> bool:  # fmt: skip
    return latent_fits(q, latent, rank)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, q_lens, kv_lens in ragged_shapes():
        slots = torch.randperm(sum(kv_lens) + 3, generator=generator)[: sum(kv_lens)]
        q = torch.randn(sum(q_lens), 3, 20, generator=generator)
        cache = torch.randn(sum(kv_lens) + 3, 20, generator=generator)
        args = (q, cache, slots, indptr(q_lens), indptr(kv_lens), 16, 0.2)
        yield Case(name, args)
        yield Case(f"{name}-fp8", (q, cache.to(torch.float8_e4m3fn), *args[2:]))


mla_extend = Op(
    "attention.mla_extend",
    triton_impl(mla_extend_triton, _accepts),
    Impl("torch", mla_extend_torch),
    cases=_cases,
)
