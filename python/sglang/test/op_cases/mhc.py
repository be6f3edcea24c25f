"""Cases of the ops ``mhc.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.test.op_cases import Case


def parameters(n: int, width: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """fn and base of ``rows`` coefficients over ``n`` streams of ``width``."""
    fn = torch.randn(rows, n * width, generator=generator) / (n * width) ** 0.5
    return fn, torch.randn(rows, generator=generator)


def streams(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Streams of some sizes, zeros and large numbers among them."""
    for rows, n, width in ((1, 4, 8), (7, 4, 12), (0, 4, 8), (5, 2, 6), (33, 4, 64), (3, 4, 320), (0, 4, 64)):
        yield f"{rows}x{n}x{width}", torch.randn(rows, n, width, generator=generator)
    yield "zeros", torch.zeros(2, 4, 8)
    yield "huge", torch.randn(2, 4, 64, generator=generator).abs() * 1e8


def hc_head() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        fn, base = parameters(x.shape[1], x.shape[2], x.shape[1], generator)
        yield Case(name, (x, fn, base, torch.rand(1, generator=generator) + 0.5, 1e-6, 1e-6))


def hc_post() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        rows, n, width = x.shape
        row = torch.randn(rows, width, generator=generator)
        post = torch.rand(rows, n, generator=generator) * 2
        yield Case(name, (row, x, post, torch.rand(rows, n, n, generator=generator)))


def hc_post_pre() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        rows, n, width = x.shape
        fn, base = parameters(n, width, (2 + n) * n, generator)
        way_out = torch.rand(rows, n, generator=generator) * 2, torch.rand(rows, n, n, generator=generator)
        row, scale = torch.randn(rows, width, generator=generator), torch.rand(3, generator=generator) + 0.5
        args = (row, x, *way_out, fn, base, scale, 1e-6, 1e-6, 20)
        yield Case(name, args)
        yield Case(f"{name}-normed", (*args, torch.rand(width, generator=generator) + 0.5, 1e-6))
    ugly = x.clone()
    ugly[0, 1, 3] = float("nan")
    yield Case("nan-row", (row, ugly, *way_out, fn, base, scale, 1e-6, 1e-6, 20, torch.ones(width), 1e-6))


def hc_pre() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        n, width = x.shape[1:]
        fn, base = parameters(n, width, (2 + n) * n, generator)
        scale = torch.rand(3, generator=generator) + 0.5
        for iterations in (20, 1):
            yield Case(f"{name}-{iterations}", (x, fn, base, scale, 1e-6, 1e-6, iterations))
    # Logits far apart: whether eps is added before the sums shows.
    yield Case("sharp", (x, fn, base * 30, scale * 4, 1e-6, 1e-6, 20))
