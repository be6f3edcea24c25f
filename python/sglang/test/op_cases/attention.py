"""Cases of the ops ``attention.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sglang.kernels.ops.attention.extend_ragged import BLOCK_ROWS
from sglang.kernels.ops.attention.tiles import MANY_HEADS
from sglang.kernels.ops.quant import group_fp8
from sglang.test.op_cases import Case


def decode_tables() -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor, int]]:
    """Name, queries per request, slot table, lengths and number of slots of the batches that decode kernels must get
    right. A request with several queries has a token for each of them."""
    generator = torch.Generator().manual_seed(5)
    lengths = {"one-row": [1], "equal": [6, 6], "ragged": [1, 9, 4, 17], "with-empty": [3, 0, 5], "empty": []}
    for name, counts in lengths.items():
        total = sum(counts) + 2
        order = iter((torch.randperm(total - 2, generator=generator) + 1).tolist())
        table = torch.full((len(counts), max(counts, default=0)), total - 1)  # the last slot is poison
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([next(order) for _ in range(count)])
        lens = torch.tensor(counts, dtype=torch.int64)
        yield name, 1, table, lens, total
        for width in (2, 4, 9):
            kept = lens >= width
            if bool(kept.any()):
                yield f"{name}-{width}-queries", width, table[kept], lens[kept], total


def request_tables() -> Iterator[tuple[str, int, tuple[torch.Tensor, torch.Tensor, torch.Tensor], int]]:
    """Name, queries per request, (request table, its rows in use, lengths) and number of slots.

    Unused entries name the last slot, which is to be poisoned.
    """
    for name, width, slots, lens, total in decode_tables():
        rows = torch.arange(slots.shape[0]).flip(0) * 2 + 1
        table = torch.full((2 * slots.shape[0] + 1, max(24, slots.shape[1] + 3)), total - 1, dtype=torch.int32)
        table[rows, : slots.shape[1]] = slots.int()
        yield name, width, (table, rows, lens), total


def spoil_ends(cache: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """``cache`` with NaN at the last token of each request."""
    return cache.index_fill(0, table.gather(1, lens.unsqueeze(1) - 1).flatten(), float("nan"))


def indptr(lengths: list[int]) -> torch.Tensor:
    """Running sum with a leading zero, int64 [len + 1]."""
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def ragged_shapes() -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, query lengths and key lengths of the batches that extend kernels must get right."""
    yield "one-token", [1], [1]
    yield "fresh", [5, 3], [5, 3]
    yield "with-prefix", [4, 1, 7], [9, 20, 7]
    yield "single-rows", [1, 1, 1], [3, 1, 17]
    yield "one-empty", [2, 0, 3], [4, 6, 3]
    yield "empty", [], []
    yield "many-blocks", [BLOCK_ROWS + 40], [BLOCK_ROWS + 77]


def expanded_views(kv: torch.Tensor, rows: torch.Tensor, nope: int, rope: int) -> tuple[torch.Tensor, ...]:
    """k, v and k_tail as expanded latent attention makes them: views of kv [M, H, nope + Dv] and of rows [M, R + P]."""
    return kv[..., :nope], kv[..., nope:], rows[:, -rope:]


def decode_attention() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, width, table, total in request_tables():
        for heads, kv_heads, dim in ((2, 2, 8), (6, 2, 24), (4, 1, 16), (20, 1, 32))[: 4 if width == 1 else 2]:
            q = torch.randn(width * len(table[1]), heads, dim, generator=generator)
            k_cache = torch.randn(total, kv_heads, dim, generator=generator)
            v_cache = torch.randn(total, kv_heads, dim, generator=generator)
            k_cache[-1], v_cache[-1] = float("nan"), float("nan")
            args = (q, k_cache, v_cache, *table, 0.3)
            yield Case(f"{name}-{heads}x{kv_heads}-{dim}", args)
            # Half of rows that alternate, as they are in a product of queries and gates; NaN stays NaN.
            gate = torch.randn(*q.shape[:2], 2, dim, generator=generator)[:, :, 1] * 3
            gate[:1, 0, 3] = float("nan")
            yield Case(f"{name}-{heads}x{kv_heads}-{dim}-gated", (*args, 0, gate))
        if width > 1:
            spoiled = spoil_ends(v_cache, table[0][table[1]].long(), table[2])
            yield Case(f"{name}-nan-values", (q, k_cache, spoiled, *table, 0.3))
        coarse = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
        yield Case(f"{name}-fp8", (q, *coarse, *table, 0.3))
        for heads in (3, MANY_HEADS + 6) if name in ("ragged", "equal-4-queries") else (3,):
            q = torch.randn(width * len(table[1]), heads, 20, generator=generator)
            latent = torch.randn(total, 1, 20, generator=generator)
            latent[-1] = float("nan")
            yield Case(f"{name}-latent-{heads}", (q, latent, None, *table, 0.2, 16))
        if width > 1:
            spoiled = spoil_ends(latent, table[0][table[1]].long(), table[2])
            yield Case(f"{name}-latent-nan", (q[:, :3], spoiled, None, *table, 0.2, 16))
        yield Case(f"{name}-latent-fp8", (q, latent.to(torch.float8_e4m3fn), None, *table, 0.2, 16))


def decode_padded() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, width, table, lens, total in decode_tables():
        for heads, kv_heads, dim in ((6, 2, 8), (2, 2, 8), (4, 1, 16))[: 3 if width == 1 else 1]:
            q = torch.randn(len(lens) * width, heads, dim, generator=generator)
            k_cache, v_cache = (torch.randn(total, kv_heads, dim, generator=generator) for _ in range(2))
            k_cache[-1], v_cache[-1] = float("nan"), float("nan")
            yield Case(f"{name}-{heads}x{kv_heads}", (q, k_cache, v_cache, table, lens, 0.3))
        if width > 1:
            spoiled = spoil_ends(v_cache, table, lens)
            yield Case(f"{name}-nan", (q, k_cache, spoiled, table, lens, 0.3))
        q = torch.randn(len(lens) * width, 3, 20, generator=generator)
        latent = torch.randn(total, 1, 20, generator=generator)
        latent[-1] = float("nan")
        yield Case(f"{name}-latent", (q, latent, None, table, lens, 0.2, 16))
        if width > 1:
            yield Case(f"{name}-latent-nan", (q, spoil_ends(latent, table, lens), None, table, lens, 0.2, 16))


def mla_decode_project() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, queries, table, total in request_tables():
        for heads, width in ((3, 24), (2, 64), (1, 256)) if queries == 1 else ():
            q = torch.randn(table[1].shape[0], heads, 20, generator=generator)
            cache = torch.randn(total, 20, generator=generator)
            cache[-1] = float("nan")
            w_vc = torch.randn(heads, width + 5, 16, generator=generator)[:, 5:].transpose(1, 2)
            args = (q, cache, *table, w_vc, 0.2)
            yield Case(f"{name}-{heads}x{width}", args)
            if heads * width % group_fp8.GROUP == 0:
                yield Case(f"{name}-{heads}x{width}-quantised", (*args, torch.float8_e4m3fn))


def extend_attention() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, q_lens, kv_lens in (*ragged_shapes(), ("no-keys", [2, 3], [4, 0])):
        for heads, kv_heads in ((2, 2), (4, 1)):
            slots = torch.randperm(sum(kv_lens) + 3, generator=generator)[: sum(kv_lens)]
            q = torch.randn(sum(q_lens), heads, 8, generator=generator)
            k_cache = torch.randn(sum(kv_lens) + 3, kv_heads, 8, generator=generator)
            v_cache = torch.randn(sum(kv_lens) + 3, kv_heads, 8, generator=generator)
            args = (q, k_cache, v_cache, slots, indptr(q_lens), indptr(kv_lens), 0.35)
            yield Case(f"{name}-{heads}x{kv_heads}", args)
        coarse = (cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache))
        yield Case(f"{name}-fp8", (q, *coarse, *args[3:]))
        q = torch.randn(sum(q_lens), 3, 20, generator=generator)
        latent = torch.randn(sum(kv_lens) + 3, 1, 20, generator=generator)
        rest = (None, slots, indptr(q_lens), indptr(kv_lens), 0.2, 16)
        yield Case(f"{name}-latent", (q, latent, *rest))
        yield Case(f"{name}-latent-fp8", (q, latent.to(torch.float8_e4m3fn), *rest))


def extend_ragged() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, q_lens, kv_lens in ragged_shapes():
        for heads, kv_heads, dim, v_dim in ((2, 2, 12, 8), (4, 2, 8, 8)):
            q = torch.randn(sum(q_lens), heads, dim, generator=generator)
            k = torch.randn(sum(kv_lens), kv_heads, dim, generator=generator)
            v = torch.randn(sum(kv_lens), kv_heads, v_dim, generator=generator)
            yield Case(f"{name}-{heads}x{kv_heads}", (q, k, v, indptr(q_lens), indptr(kv_lens), 0.3))
        for heads, kv_heads, nope, rope in ((3, 3, 16, 4), (4, 2, 5, 11)):
            q = torch.randn(sum(q_lens), heads, nope + rope, generator=generator)
            kv = torch.randn(sum(kv_lens), kv_heads, nope + 8, generator=generator)
            rows = torch.randn(sum(kv_lens), 32, generator=generator)
            k, v, tail = expanded_views(kv, rows, nope, rope)
            yield Case(f"{name}-tail-{heads}x{kv_heads}", (q, k, v, indptr(q_lens), indptr(kv_lens), 0.3, tail))
