"""Cases of the ops ``activation.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case


def sigmoid_mul() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, dim in ((1, 1, 8), (5, 3, 12), (0, 2, 8), (9, 16, 256)):
        both = torch.randn(tokens, heads, 2, dim, generator=generator) * 3
        yield Case(f"{tokens}x{heads}x{dim}", (both[:, :, 0].contiguous(), both[:, :, 1]))
    wide = torch.tensor([[-200.0, 200.0, 0.0, float("inf"), float("-inf")]])
    yield Case("saturated", (torch.full_like(wide, 3.0), wide))
    yield Case("nan-row", (torch.ones(2, 2), torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])))


def silu_and_mul_quantized() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for rows, width in ((1, 128), (5, 384), (0, 256), (33, 2304)):
        x = torch.randn(rows, 2 * width, generator=generator)
        yield Case(f"{rows}x{width}", (x, torch.float8_e4m3fn))
        yield Case(f"{rows}x{width}-clamped", (x, torch.float8_e4m3fn, 0.5))


def silu_and_mul() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 2), (5, 6), (0, 8), (17, 258)):
        x = torch.randn(rows, width, generator=generator)
        yield Case(f"{rows}x{width}", (x,))
        yield Case(f"{rows}x{width}-clamped", (x, 0.5))
    yield Case("saturated", (torch.tensor([[-200.0, 200.0, 3.0, 3.0], [0.0, -0.0, 1e30, -1e30]]),))
    yield Case("clamped-far", (torch.tensor([[-9.0, 9.0, -9.0, 9.0, 9.0, 9.0, -9.0, -9.0]]), 2.0))
    yield Case("nan-row", (torch.tensor([[float("nan"), 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),))
