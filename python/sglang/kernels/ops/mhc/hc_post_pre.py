"""Out of one sub-block of hyper-connections and into the next, whose norm may be part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.mhc.hc_post import hc_post_torch
from sglang.kernels.ops.mhc.hc_post_pre_aiter import aiter_impls
from sglang.kernels.ops.mhc.hc_pre import hc_pre_torch
from sglang.kernels.ops.mhc.launchers import fits_way_in, fits_way_out, join_streams, make_parts, mix_streams
from sglang.kernels.ops.norm.rmsnorm import rms_norm_torch
from sglang.kernels.spec import Impl, Op

# The new streams, the next sub-block's input, post and comb for the way out of it, and whether the input is normed.
PostPre = tuple[Tensor, Tensor, Tensor, Tensor, bool]


def hc_post_pre_torch(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> PostPre:  # fmt: skip
    """``hc_post`` of one sub-block, ``hc_pre`` of the next on what that gives, and RMS norm of the row if it is given.

    row [N, D], x [N, n, D], post [N, n], comb [N, n, n] as ``hc_post`` takes them, fn, base and scale as ``hc_pre``,
    norm_weight [D] float32 -> streams [N, n, D], row [N, D], post, comb, all new, and norm_fused. An implementation may
    leave the norm to the caller, and says norm_fused False then, as it does without a norm.
    """
    x = hc_post_torch(row, x, post, comb)
    row, post, comb = hc_pre_torch(x, fn, base, scale, rms_eps, hc_eps, iterations)
    if norm_weight is None:
        return x, row, post, comb, False
    return x, rms_norm_torch(row, norm_weight, norm_eps), post, comb, True


def hc_post_pre_triton(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> PostPre:  # fmt: skip
    parts = make_parts(x.shape[0], x.shape[2], fn.shape[0], x.device)
    x = mix_streams(x, row, post, comb, fn, parts)
    joined = join_streams(x, parts, base, scale, rms_eps, hc_eps, iterations, norm_weight, norm_eps)
    return (x, *joined, norm_weight is not None)


def _accepts(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> bool:  # fmt: skip
    gain = norm_weight is None or (norm_weight.dtype == torch.float32 and norm_weight.is_contiguous())
    return gain and iterations > 0 and fits_way_out(row, x, post, comb) and fits_way_in(x, fn, base, scale)


hc_post_pre = Op(
    "mhc.hc_post_pre", *aiter_impls(), triton_impl(hc_post_pre_triton, _accepts), Impl("torch", hc_post_pre_torch)
)
