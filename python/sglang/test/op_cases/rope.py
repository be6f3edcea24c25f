"""Cases of the ops ``rope.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case


def rotary() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        ("one-row", 1, 1, 1, 8, 8),
        ("partial", 5, 4, 2, 24, 8),
        ("mla", 7, 3, 1, 64, 64),
        ("empty", 0, 2, 1, 8, 8),
    )
    for name, rows, heads, kv_heads, dim, rotary_dim in shapes:
        angles = torch.rand(32, rotary_dim // 2, generator=generator) * 6.3
        cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
        positions = torch.randint(0, 32, (rows,), generator=generator)
        q = torch.randn(rows, heads, dim, generator=generator)
        k = torch.randn(rows, kv_heads, dim, generator=generator)
        for is_neox in (True, False):
            yield Case(f"{name}-{'neox' if is_neox else 'interleaved'}", (positions, q, k, cache, is_neox))


def rotary_tail() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, rows, heads, width, rotary in (
        ("one-row", 1, 1, 8, 8), ("partial", 5, 4, 24, 8), ("empty", 0, 2, 8, 4), ("wide", 9, 3, 64, 16),
    ):  # fmt: skip
        angles = torch.rand(32, rotary // 2, generator=generator) * 6.3
        cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
        positions = torch.randint(0, 32, (rows,), generator=generator)
        x = torch.randn(rows, heads, width, generator=generator)
        for inverse in (False, True):
            yield Case(f"{name}-{'back' if inverse else 'forth'}", (x, positions, cache, inverse))
