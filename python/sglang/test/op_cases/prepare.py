"""Cases of the ops ``prepare.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case


def gqa() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (1, 1, 1, 8, 8, 8),
        (5, 6, 2, 24, 8, 12),
        (0, 2, 1, 8, 4, 8),
        (7, 9, 3, 20, 20, 33),
        (3, 16, 2, 256, 64, 256),
    )
    for tokens, heads, kv_heads, dim, rope, value in shapes:
        angles = torch.rand(32, rope // 2, generator=generator) * 6.3
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        # Queries alternate with their gates, and all come out of one product.
        both = torch.randn(tokens, heads * 2 * dim + kv_heads * (dim + value), generator=generator)
        gated, k, v = both.split((heads * 2 * dim, kv_heads * dim, kv_heads * value), dim=-1)
        q = gated.unflatten(-1, (heads, 2, dim))[:, :, 0]
        k, v = k.unflatten(-1, (kv_heads, dim)), v.unflatten(-1, (kv_heads, value))
        weights = torch.randn(2, dim, generator=generator)
        positions = torch.randint(0, 32, (tokens,), generator=generator)
        caches = [torch.randn(16, kv_heads, width, generator=generator) for width in (dim, value)]
        slots = torch.randperm(15, generator=generator)[:tokens] + 1
        for is_neox in (True, False):
            name = f"{tokens}x{heads}x{dim}-{'neox' if is_neox else 'interleaved'}"
            yield Case(name, (q, k, v, *weights, positions, table, *caches, slots, 1e-6, is_neox))
        coarse = [cache.to(torch.float8_e4m3fn) for cache in caches]
        yield Case(f"{tokens}x{heads}x{dim}-fp8", (q, k, v, *weights, positions, table, *coarse, slots, 1e-6, True))


def mla() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, nope, rope, rank in ((1, 1, 4, 8, 16), (5, 3, 12, 4, 20), (0, 2, 8, 8, 16), (9, 40, 6, 64, 33)):
        angles = torch.rand(32, rope // 2, generator=generator) * 6.3
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        positions = torch.randint(0, 32, (tokens,), generator=generator)
        q = torch.randn(tokens, heads, nope + rope, generator=generator)
        wide = torch.randn(tokens, 2 * (rank + rope), generator=generator)
        weight = torch.randn(rank, generator=generator)
        cache = torch.randn(16, rank + rope, generator=generator)
        slots = torch.randperm(15, generator=generator)[:tokens] + 1
        shared = (q, wide[:, : rank + rope], positions, table, weight, cache, slots, 1e-6)
        for is_neox in (True, False):
            name = f"{tokens}x{heads}-{'neox' if is_neox else 'interleaved'}"
            yield Case(f"{name}-in-place", (*shared, is_neox))
            queries = torch.randn(tokens, heads, rank + rope, generator=generator)
            yield Case(name, (*shared, is_neox, queries))
            # Rows of the two halves of kv_b_proj are one after the other.
            w_kc = torch.randn(heads, nope + 3, rank, generator=generator)[:, :nope]
            yield Case(f"{name}-absorbed", (*shared, is_neox, queries, w_kc))
        yield Case(f"{tokens}x{heads}-fp8", (*shared[:5], cache.to(torch.float8_e4m3fn), slots, 1e-6, False))
