"""The end of hyper-connections: the one row that the output head reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.mhc.hc_pre import normed_product, parameters, streams, weighted_streams
from sglang.kernels.spec import Case, Impl, Op


def hc_head_torch(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    """Streams x [N, n, D] -> [N, D] in x's dtype; fn [n, n * D], base [n] and scale [1] are float32."""
    weights = torch.sigmoid(normed_product(x, fn, rms_eps) * scale + base) + hc_eps
    return weighted_streams(x, weights)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        fn, base = parameters(x.shape[1], x.shape[2], x.shape[1], generator)
        yield Case(name, (x, fn, base, torch.rand(1, generator=generator) + 0.5, 1e-6, 1e-6))


hc_head = Op("mhc.hc_head", Impl("torch", hc_head_torch), cases=_cases)
