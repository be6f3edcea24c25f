"""Root-mean-square norms over the last dimension, with and without a residual, in both weight conventions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.spec import Case, Impl, Op


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * cast(x * rsqrt(mean(x^2) + eps))``.

    x [..., D] float, weight [D] -> [..., D] in x's dtype. The product with the weight comes after the cast, as in
    DeepSeek's reference code (it matters in bf16 only). Zhang & Sennrich 2019, eq. 4.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def gemma_rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x^2) + eps) * (1 + weight)``, all in float32, cast last.

    x [..., D] float, weight [D] (zero means unit gain) -> [..., D] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def gated_rms_norm_torch(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm, then a SiLU gate: ``weight * cast(norm(x)) * silu(gate)``.

    x [..., D], gate [..., D], weight [D] -> [..., D] in x's dtype; the gate is applied in float32.
    """
    normed = rms_norm_torch(x, weight, eps)
    return (normed.float() * torch.nn.functional.silu(gate.float())).to(x.dtype)


def _inputs() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows, dim in ((1, 8), (3, 129), (0, 16), (64, 512)):
        yield (
            f"{rows}x{dim}",
            torch.randn(rows, dim, generator=generator),
            torch.randn(dim, generator=generator),
        )
    yield "zero-row", torch.zeros(2, 16), torch.ones(16)
    yield "huge", torch.full((1, 16), 1e18), torch.ones(16)


def _plain_cases() -> Iterator[Case]:
    for name, x, weight in _inputs():
        yield Case(name, (x, weight, 1e-6))


def _gated_cases() -> Iterator[Case]:
    for name, x, weight in _inputs():
        yield Case(name, (x, x.flip(-1).clone(), weight, 1e-6))


rms_norm = Op("norm.rms_norm", Impl("torch", rms_norm_torch), cases=_plain_cases)
gemma_rms_norm = Op("norm.gemma_rms_norm", Impl("torch", gemma_rms_norm_torch), cases=_plain_cases)
gated_rms_norm = Op("norm.gated_rms_norm", Impl("torch", gated_rms_norm_torch), cases=_gated_cases)
