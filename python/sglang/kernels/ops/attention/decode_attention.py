"""One query per request over the paged cache, slots read from the request table: keys and values, or latent rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.decode_padded import decode_padded_torch, decode_tables
from sglang.kernels.ops.attention.launchers import latent_fits, launch_decode, rows_fit
from sglang.kernels.ops.attention.mla_decode import mla_decode_torch
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.spec import Case, Impl, Op


def decode_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each request's one query over its slots.

    q [B, Hq, D], k_cache [S, Hk, D], v_cache [S, Hk, Dv], req_to_token [R, C] int32 (entries past a length are never
    used), req_pool_indices [B] int64 rows of it, seq_lens [B] int64 in [0, C] -> [B, Hq, Dv] in q's dtype, computed in
    float32; a row of length 0 gives zeros. This reference reads the longest length on the host.
    """
    table = slots_of(req_to_token, req_pool_indices, seq_lens)
    return decode_padded_torch(q, k_cache, v_cache, table, seq_lens, scale)


def mla_decode_attention_torch(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """Softmax attention where all heads share one key row per token, whose first R columns are the value.

    q [B, H, R+P] (query times W_UK, then the rotated part), latent_cache [S, R+P] -> [B, H, R]; the rest as in
    ``decode_attention_torch``. DeepSeek-V2 report, section 2.1 and appendix C.
    """
    table = slots_of(req_to_token, req_pool_indices, seq_lens)
    return mla_decode_torch(q, latent_cache, table, seq_lens, kv_lora_rank, scale)


def slots_of(req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Slots of the requests, [B, longest] int64."""
    longest = int(seq_lens.max()) if seq_lens.numel() else 0
    return req_to_token[:, :longest].index_select(0, req_pool_indices).long()


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    shape = RowShape.of(q.shape[2], v_cache.shape[2])
    return launch_decode(q, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, scale, shape)


def mla_decode_attention_triton(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    shape = RowShape.of(q.shape[2], kv_lora_rank, value_is_key=True)
    rows = latent_cache.unsqueeze(1)
    return launch_decode(q, rows, rows, req_to_token, req_pool_indices, seq_lens, scale, shape)


def fits_table(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, *rest: object
) -> bool:
    """Whether the kernels read these rows and this request table."""
    return rows_fit(q, k_cache, v_cache) and table.stride(1) == 1


def fits_latent_table(
    q: torch.Tensor, latent: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor, rank: int,
    scale: float,
) -> bool:  # fmt: skip
    """The same over latent rows."""
    return latent_fits(q, latent, rank) and table.stride(1) == 1


def latent_tables() -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor], int]]:
    """Name, (request table, its rows in use, lengths) and number of slots; unused entries name the poisoned slot."""
    for name, slots, lens, total in decode_tables():
        rows = torch.arange(slots.shape[0]).flip(0) * 2 + 1
        table = torch.full((2 * slots.shape[0] + 1, max(24, slots.shape[1] + 3)), total - 1, dtype=torch.int32)
        table[rows, : slots.shape[1]] = slots.int()
        yield name, (table, rows, lens), total


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, table, total in latent_tables():
        for heads, kv_heads, dim in ((2, 2, 8), (6, 2, 24), (4, 1, 16), (20, 1, 32)):
            q = torch.randn(table[1].shape[0], heads, dim, generator=generator)
            k_cache = torch.randn(total, kv_heads, dim, generator=generator)
            v_cache = torch.randn(total, kv_heads, dim, generator=generator)
            k_cache[-1], v_cache[-1] = float("nan"), float("nan")
            yield Case(f"{name}-{heads}x{kv_heads}-{dim}", (q, k_cache, v_cache, *table, 0.3))
        coarse = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
        yield Case(f"{name}-fp8", (q, *coarse, *table, 0.3))


def _latent_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, table, total in latent_tables():
        for heads in (3, 70):
            q = torch.randn(table[1].shape[0], heads, 20, generator=generator)
            cache = torch.randn(total, 20, generator=generator)
            cache[-1] = float("nan")
            yield Case(f"{name}-{heads}", (q, cache, *table, 16, 0.2))
        yield Case(f"{name}-fp8", (q, cache.to(torch.float8_e4m3fn), *table, 16, 0.2))


decode_attention = Op(
    "attention.decode_attention",
    triton_impl(decode_attention_triton, fits_table),
    Impl("torch", decode_attention_torch),
    cases=_cases,
)
mla_decode_attention = Op(
    "attention.mla_decode_attention",
    triton_impl(mla_decode_attention_triton, fits_latent_table),
    Impl("torch", mla_decode_attention_torch),
    cases=_latent_cases,
)
