"""Residual add and RMS norm as one op, in both weight conventions; nothing is updated in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.norm.rmsnorm import gemma_rms_norm_torch, rms_norm_torch
from sglang.kernels.spec import Case, Impl, Op


def fused_add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual``; returns ``(rms_norm(s, weight), s)``.

    x, residual [..., D] of one dtype, weight [D] -> two new tensors [..., D] in that dtype.
    """
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def fused_add_gemma_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual``; returns ``(gemma_rms_norm(s, weight), s)``: gain ``1 + weight``.

    x, residual [..., D] of one dtype, weight [D] -> two new tensors [..., D] in that dtype.
    """
    total = x + residual
    return gemma_rms_norm_torch(total, weight, eps), total


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for rows, dim in ((1, 8), (3, 129), (0, 16), (33, 256)):
        x, residual = (torch.randn(rows, dim, generator=generator) for _ in range(2))
        yield Case(f"{rows}x{dim}", (x, residual, torch.randn(dim, generator=generator), 1e-6))
    x = torch.randn(2, 16, generator=generator)
    yield Case("cancelling", (x, -x, torch.ones(16), 1e-6))


fused_add_rms_norm = Op("norm.fused_add_rms_norm", Impl("torch", fused_add_rms_norm_torch), cases=_cases)
fused_add_gemma_rms_norm = Op(
    "norm.fused_add_gemma_rms_norm", Impl("torch", fused_add_gemma_rms_norm_torch), cases=_cases
)
