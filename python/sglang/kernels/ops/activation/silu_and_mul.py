"""SwiGLU's activation: SiLU of the first half times the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, rows_of, triton_impl
from sglang.kernels.spec import Case, Impl, Op


def silu_and_mul_torch(x: Tensor, limit: float | None = None) -> Tensor:
    """``silu(x[..., :I]) * x[..., I:]``; with a ``limit``, of the gate up to it and of the rest within +-limit.

    x [..., 2I] float -> [..., I] in x's dtype. Shazeer 2020 (SwiGLU), without the projections; the limit as in
    DeepSeek V4.
    """
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def limit_option(limit: float | None) -> dict[str, float]:
    """What a Triton body that clamps is given; a limit is part of its code."""
    return {} if limit is None else {"LIMIT": limit}


def silu_and_mul_triton(x: Tensor, limit: float | None = None) -> Tensor:
    from sglang.kernels.ops.activation.silu_and_mul_triton import silu_and_mul_kernel

    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = rows_of(x)
    assert rows is not None
    if out.numel():
        block = min(2048, next_power_of_2(width))
        blocks = cdiv(width, block)
        silu_and_mul_kernel[(rows.num_rows * blocks,)](
            x, out, width, *rows[1:], blocks, BLOCK=block, **limit_option(limit), num_warps=4
        )
    return out


def _accepts(x: Tensor, limit: float | None = None) -> bool:
    return x.dtype in FLOATS and x.shape[-1] % 2 == 0 and rows_of(x) is not None


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 2), (5, 6), (0, 8), (17, 258)):
        x = torch.randn(rows, width, generator=generator)
        yield Case(f"{rows}x{width}", (x,))
        yield Case(f"{rows}x{width}-clamped", (x, 0.5))
    yield Case("saturated", (torch.tensor([[-200.0, 200.0, 3.0, 3.0], [0.0, -0.0, 1e30, -1e30]]),))
    yield Case("clamped-far", (torch.tensor([[-9.0, 9.0, -9.0, 9.0, 9.0, 9.0, -9.0, -9.0]]), 2.0))
    yield Case("nan-row", (torch.tensor([[float("nan"), 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),))


silu_and_mul = Op(
    "activation.silu_and_mul",
    triton_impl(silu_and_mul_triton, _accepts),
    Impl("torch", silu_and_mul_torch),
    cases=_cases,
)
