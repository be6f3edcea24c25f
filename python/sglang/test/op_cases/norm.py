"""Cases of the ops ``norm.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.quant import group_fp8
from sglang.test.op_cases import Case


def add_norm_logits() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(4)
    for rows, dim, experts in ((1, 128, 5), (3, 384, 130), (2, 129, 264), (7, 1152, 16)):
        x, residual = (torch.randn(rows, dim + 4, generator=generator)[:, :dim] for _ in range(2))
        weight, gate = torch.randn(dim, generator=generator), torch.randn(experts, dim, generator=generator)
        args = (x, residual, weight, 1e-6, gate / dim**0.5, torch.float32)
        yield Case(f"{rows}x{dim}x{experts}", args)
        yield Case(f"{rows}x{dim}x{experts}-unit-offset", (*args, True))
        if dim % group_fp8.GROUP == 0:
            yield Case(f"{rows}x{dim}x{experts}-quantised", (*args, False, torch.float8_e4m3fn))
    ugly = torch.randn(2, 128, generator=generator)
    ugly[0, 3] = float("nan")
    yield Case("nan-row", (ugly, ugly.flip(1).clone(), torch.ones(128), 1e-6, torch.ones(3, 128), torch.float32))


def fused_add_rms_norm() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for rows, dim in ((1, 8), (3, 129), (0, 16), (33, 256)):
        x, residual = (torch.randn(rows, dim, generator=generator) for _ in range(2))
        args = (x, residual, torch.randn(dim, generator=generator), 1e-6)
        yield Case(f"{rows}x{dim}", args)
        yield Case(f"{rows}x{dim}-unit-offset", (*args, True))
    x = torch.randn(2, 16, generator=generator)
    yield Case("cancelling", (x, -x, torch.ones(16), 1e-6))


def norm_product() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(5)
    for rows, dim, width in ((1, 128, 5), (3, 384, 130), (0, 128, 8), (1, 129, 3), (1, 1152, 200)):
        x, residual = (torch.randn(rows, dim + 4, generator=generator)[:, :dim] for _ in range(2))
        weight, w = torch.randn(dim, generator=generator), torch.randn(width, dim, generator=generator) / dim**0.5
        for added in (residual, None):
            name = f"{rows}x{dim}x{width}{'-alone' if added is None else ''}"
            yield Case(name, (x, added, weight, 1e-6, w))
            yield Case(f"{name}-unit-offset", (x, added, weight, 1e-6, w, True))
    ugly, residual = torch.ones(1, 129), torch.ones(1, 129)
    ugly[0, 3] = float("nan")
    yield Case("nan-row", (ugly, residual, torch.ones(129), 1e-6, torch.ones(3, 129)))


def _inputs() -> Iterator[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows, dim in ((1, 8), (3, 129), (0, 16), (64, 512)):
        yield f"{rows}x{dim}", torch.randn(rows, dim, generator=generator), torch.randn(dim, generator=generator)
    yield "zero-row", torch.zeros(2, 16), torch.ones(16)
    yield "huge", torch.full((1, 16), 1e18), torch.ones(16)


def rms_norm() -> Iterator[Case]:
    for name, x, weight in _inputs():
        yield Case(name, (x, weight, 1e-6))
        yield Case(f"{name}-unit-offset", (x, weight, 1e-6, True))


def gated_rms_norm() -> Iterator[Case]:
    for name, x, weight in _inputs():
        yield Case(name, (x, x.flip(-1).clone(), weight, 1e-6))


def rms_norm_quantized() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    for rows, dim in ((1, 128), (3, 384), (0, 256), (33, 1152)):
        x, residual = (torch.randn(rows, dim, generator=generator) for _ in range(2))
        weight = torch.randn(dim, generator=generator)
        yield Case(f"{rows}x{dim}", (x, residual, weight, 1e-6, torch.float8_e4m3fn))
        yield Case(f"{rows}x{dim}-alone", (x, None, weight, 1e-6, torch.float8_e4m3fn))
    x = torch.randn(2, 256, generator=generator)
    yield Case("cancelling", (x, -x, torch.ones(256), 1e-6, torch.float8_e4m3fn))
