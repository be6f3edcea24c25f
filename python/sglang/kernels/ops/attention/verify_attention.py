"""Several queries per request, those of its last tokens, over the paged cache: a verify step of speculation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.decode_attention import (
    decode_attention_torch,
    fits_latent_table,
    fits_table,
    mla_decode_attention_torch,
    mla_decode_attention_triton,
)
from sglang.kernels.ops.attention.launchers import launch_decode
from sglang.kernels.ops.attention.tiles import MANY_HEADS, RowShape
from sglang.kernels.spec import Case, Impl, Op


def verify_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``attention.decode_attention`` of W queries per request, each of which sees the tokens up to its own.

    q [B*W, Hq, D], packed by request, in the order of its last W tokens; seq_lens [B] int64 in [W, C] count them all;
    the rest as there -> [B*W, Hq, Dv]. What a later token left in the cache, NaN included, changes no earlier row.
    """
    return decode_attention_torch(q, k_cache, v_cache, req_to_token, *_by_row(q, req_pool_indices, seq_lens), scale)


def mla_verify_attention_torch(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """``attention.mla_decode_attention`` of W queries per request: q [B*W, H, R+P] -> [B*W, H, R]."""
    rows = _by_row(q, req_pool_indices, seq_lens)
    return mla_decode_attention_torch(q, latent_cache, req_to_token, *rows, kv_lora_rank, scale)


def _by_row(
    q: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request rows and lengths of single queries, [B*W] each."""
    width = _width(q, seq_lens)
    back = torch.arange(1 - width, 1, device=seq_lens.device)
    return req_pool_indices.repeat_interleave(width), (seq_lens.unsqueeze(1) + back).flatten()


def _width(q: torch.Tensor, seq_lens: torch.Tensor) -> int:
    return q.shape[0] // max(1, seq_lens.shape[0])


def verify_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    shape = RowShape.of(q.shape[2], v_cache.shape[2])
    rest = (req_to_token, req_pool_indices, seq_lens, scale, shape)
    return launch_decode(q, k_cache, v_cache, *rest, repeat=_width(q, seq_lens))


def mla_verify_attention_triton(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    if q.shape[1] >= MANY_HEADS:
        # The heads of one query fill a program, and those of the next read what it has just read. On an H200 (triton
        # 3.6.0, 2026-11-29, 4 queries of 128 heads, 32 requests of 1k tokens) a step of V3 takes 8.64 ms so, 9.30 else.
        by_row = _by_row(q, req_pool_indices, seq_lens)
        return mla_decode_attention_triton(q, latent_cache, req_to_token, *by_row, kv_lora_rank, scale)
    shape = RowShape.of(q.shape[2], kv_lora_rank, value_is_key=True)
    rows = latent_cache.unsqueeze(1)
    rest = (req_to_token, req_pool_indices, seq_lens, scale, shape)
    return launch_decode(q, rows, rows, *rest, repeat=_width(q, seq_lens))


def _tables(generator: torch.Generator) -> Iterator[tuple[str, int, tuple[torch.Tensor, ...], int]]:
    """Name, queries per request, (request table, its rows in use, lengths) and slots, of which the last is poisoned."""
    for name, width, lens in (
        ("one", 2, [2]),
        ("ragged", 4, [4, 37, 5, 64]),
        ("wide", 9, [9, 20]),
        ("single", 1, [3, 1]),
        ("empty", 3, []),
    ):
        total = sum(lens) + 2
        table = torch.full((len(lens) + 1, 70), total - 1, dtype=torch.int32)
        order, start = torch.randperm(total - 2, generator=generator).int() + 1, 0
        for row, length in enumerate(lens):
            table[row + 1, :length] = order[start : start + length]
            start += length
        yield name, width, (table, torch.arange(len(lens)) + 1, torch.tensor(lens, dtype=torch.int64)), total


def _poison_last(table: tuple[torch.Tensor, ...], *caches: torch.Tensor) -> None:
    """NaN in the slot that nothing names, and in that of each request's last token: one query of it sees that."""
    for cache in caches:
        cache[-1] = torch.nan
        for row, length in zip(table[1].tolist(), table[2].tolist(), strict=True):
            cache[table[0][row, length - 1].long()] = torch.nan


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, width, table, total in _tables(generator):
        for heads, kv_heads, dim in ((6, 2, 24), (4, 1, 16)):
            q = torch.randn(width * len(table[2]), heads, dim, generator=generator)
            k_cache, v_cache = torch.randn(2, total, kv_heads, dim, generator=generator)
            yield Case(f"{name}-{heads}x{kv_heads}", (q, k_cache, v_cache, *table, 0.3))
            spoiled = v_cache.clone()
            _poison_last(table, spoiled)
            yield Case(f"{name}-{heads}x{kv_heads}-nan-values", (q, k_cache, spoiled, *table, 0.3))
        coarse = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
        yield Case(f"{name}-fp8", (q, *coarse, *table, 0.3))


def _latent_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, width, table, total in _tables(generator):
        cache = torch.randn(total, 20, generator=generator)
        for heads in (MANY_HEADS + 6, 20) if name in ("ragged", "empty") else (3, 20):
            q = torch.randn(width * len(table[2]), heads, 20, generator=generator)
            yield Case(f"{name}-{heads}", (q, cache, *table, 16, 0.2))
        spoiled = cache.clone()
        _poison_last(table, spoiled)
        yield Case(f"{name}-nan", (q, spoiled, *table, 16, 0.2))


verify_attention = Op(
    "attention.verify_attention",
    triton_impl(verify_attention_triton, fits_table),
    Impl("torch", verify_attention_torch),
    cases=_cases,
)
mla_verify_attention = Op(
    "attention.mla_verify_attention",
    triton_impl(mla_verify_attention_triton, fits_latent_table),
    Impl("torch", mla_verify_attention_torch),
    cases=_latent_cases,
)
