"""The way into a sub-block of hyper-connections: one row of all streams, and the coefficients of the way out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.mhc.launchers import fits_way_in, join_streams, make_parts, mix_streams
from sglang.kernels.spec import Impl, Op


def normed_product(x: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    """``fn (x / rms(x))`` over all streams of a token: x [N, n, D] float, fn [m, n * D] float32 -> [N, m] float32."""
    flat = x.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)


def weighted_streams(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_j weights[:, j] x[:, j]``: x [N, n, D], weights [N, n] float32 -> [N, D] in x's dtype; sums in float32."""
    return (weights.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


def balance(matrix: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn's steps as DeepSeek V4 takes them: matrix [N, n, n] logits -> [N, n, n], rows and columns near sum 1.

    The first step is a softmax over each row, raised by eps, and columns; the other ``iterations`` - 1 are rows, then
    columns. Each sum is raised by eps.
    """
    p = matrix.softmax(-1) + eps
    p = p / (p.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        p = p / (p.sum(-1, keepdim=True) + eps)
        p = p / (p.sum(-2, keepdim=True) + eps)
    return p


def hc_pre_torch(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams x [N, n, D] -> the sub-block's input [N, D] in x's dtype, post [N, n] and comb [N, n, n] float32.

    fn [(2 + n) * n, n * D], base [(2 + n) * n] and scale [3] are float32; rows of fn are n of pre, n of post, n * n of
    comb by (source, destination). All coefficients are computed in float32. mHC (Xie et al. 2026) as in DeepSeek V4.
    """
    n = x.shape[1]
    pre, post, comb = normed_product(x, fn, rms_eps).split((n, n, n * n), dim=-1)
    pre_base, post_base, comb_base = base.split((n, n, n * n))
    row = weighted_streams(x, torch.sigmoid(pre * scale[0] + pre_base) + hc_eps)
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    return row, post, balance((comb * scale[2] + comb_base).unflatten(-1, (n, n)), iterations, hc_eps)


def hc_pre_triton(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    parts = make_parts(x.shape[0], x.shape[2], fn.shape[0], x.device)
    mix_streams(x, fn=fn, parts=parts)
    return join_streams(x, parts, base, scale, rms_eps, hc_eps, iterations)


def _accepts(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, iterations: int
) -> bool:
    return iterations > 0 and fits_way_in(x, fn, base, scale)


hc_pre = Op("mhc.hc_pre", triton_impl(hc_pre_triton, _accepts), Impl("torch", hc_pre_torch))
