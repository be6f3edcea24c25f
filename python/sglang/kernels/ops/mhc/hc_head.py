"""The end of hyper-connections: the one row that the output head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.mhc.hc_pre import normed_product, weighted_streams
from sglang.kernels.ops.mhc.launchers import fits_way_in, join_streams, make_parts, mix_streams
from sglang.kernels.spec import Impl, Op


def hc_head_torch(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    """Streams x [N, n, D] -> [N, D] in x's dtype; fn [n, n * D], base [n] and scale [1] are float32."""
    weights = torch.sigmoid(normed_product(x, fn, rms_eps) * scale + base) + hc_eps
    return weighted_streams(x, weights)


def hc_head_triton(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    parts = make_parts(x.shape[0], x.shape[2], fn.shape[0], x.device)
    mix_streams(x, fn=fn, parts=parts)
    return join_streams(x, parts, base, scale, rms_eps, hc_eps)[0]


def _accepts(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float) -> bool:
    return fits_way_in(x, fn, base, scale)


hc_head = Op("mhc.hc_head", triton_impl(hc_head_triton, _accepts), Impl("torch", hc_head_torch))
