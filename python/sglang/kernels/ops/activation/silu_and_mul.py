"""SwiGLU's activation: SiLU of the first half times the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sglang.kernels.spec import Case, Impl, Op


def silu_and_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :I]) * x[..., I:]``.

    x [..., 2I] float -> [..., I] in x's dtype. Shazeer 2020 (SwiGLU), without the projections.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 2), (5, 6), (0, 8), (17, 258)):
        yield Case(f"{rows}x{width}", (torch.randn(rows, width, generator=generator),))
    yield Case("saturated", (torch.tensor([[-200.0, 200.0, 3.0, 3.0], [0.0, -0.0, 1e30, -1e30]]),))
    yield Case("nan-row", (torch.tensor([[float("nan"), 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),))


silu_and_mul = Op("activation.silu_and_mul", Impl("torch", silu_and_mul_torch), cases=_cases)
