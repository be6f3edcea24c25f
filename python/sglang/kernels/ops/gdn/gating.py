"""Decay and write strength of a gated delta net, from the two per-head projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sglang.kernels.spec import Case, Impl, Op


def gdn_gating_torch(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``.

    a, b [N, HV] float, A_log, dt_bias [HV] -> g (log decay, at most 0) and beta, both [N, HV] float32. softplus takes
    its linear branch above 20. Yang et al. 2024 (Gated Delta Networks), the Mamba-2 parametrisation of the decay.
    """
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, heads in ((1, 1), (5, 6), (0, 4), (130, 32)):
        a, b = torch.randn(2, rows, heads, generator=generator)
        A_log = torch.rand(heads, generator=generator).mul(16).log()
        yield Case(f"{rows}x{heads}", (a, b, A_log, torch.ones(heads)))
    far = torch.tensor([[-100.0, -20.0, 0.0, 19.9, 20.1, 100.0]])
    yield Case("far", (far, far.clone(), torch.zeros(6), torch.zeros(6)))
    yield Case("bf16", (far.bfloat16(), far.bfloat16(), torch.ones(6), torch.ones(6)))


gdn_gating = Op("gdn.gating", Impl("torch", gdn_gating_torch), cases=_cases)
