"""Scaling of query and key heads to unit length, as gated delta nets do before the recurrence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.spec import Case, Impl, Op


def l2_norm_torch(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """``x * rsqrt(sum(x^2) + eps)`` over the last dimension: a sum, not a mean, with eps inside the root.

    x [..., D] float -> [..., D] float32. A zero row stays zero.
    """
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 8), (3, 5, 33), (0, 2, 16), (64, 4, 128)):
        yield Case("x".join(map(str, shape)), (torch.randn(*shape, generator=generator),))
    yield Case("zero-row", (torch.zeros(2, 1, 16),))
    yield Case("below-eps", (torch.full((1, 2, 16), 1e-5),))
    yield Case("bf16", (torch.randn(3, 2, 32, generator=generator).bfloat16(),))


l2_norm = Op("gdn.l2_norm", Impl("torch", l2_norm_torch), cases=_cases)
