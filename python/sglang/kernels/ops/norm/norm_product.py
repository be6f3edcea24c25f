"""Residual add, RMS norm and the product that follows as one op, for steps of one row, whose launches cost most."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, early_start, next_power_of_2, triton_impl
from sglang.kernels.ops.linear.dense import ROW_MAX_ELEMENTS, dense_linear, dense_linear_torch
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm, fused_add_rms_norm_torch
from sglang.kernels.ops.norm.rmsnorm import fits_triton, rms_norm, rms_norm_torch
from sglang.kernels.spec import Impl, Op

# The widest row that a program norms for its outputs, and how many weights it holds, at most 8 rows of them, by 64 for
# each thread. A step of V2-Lite with it takes 0.970 of the time on one H200, triton 3.6.0, 2026-11-30. Of 8-bit weights
# a program would quantise the row too: in that form a step of V3 took 1.04 of the time.
MAX_DIM = 4096
WEIGHTS, OF_WARP = 1 << 14, 1 << 11


def norm_product_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, w: Tensor, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``norm.fused_add_rms_norm``, and the normed rows times w as in ``linear.dense``.

    x [N, D] float, residual alike or None for nothing, weight [D], w [R, D] in x's dtype -> product [N, R], normed rows
    [N, D] and the sum, which is x itself without a residual.
    """
    if residual is None:
        normed, total = rms_norm_torch(x, weight, eps, unit_offset), x
    else:
        normed, total = fused_add_rms_norm_torch(x, residual, weight, eps, unit_offset)
    return dense_linear_torch(normed, w), normed, total


def norm_product_apart(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, w: Tensor, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The ops one after the other."""
    if residual is None:
        normed, total = rms_norm(x, weight, eps, unit_offset), x
    else:
        normed, total = fused_add_rms_norm(x, residual, weight, eps, unit_offset)
    return dense_linear(normed, w), normed, total


def norm_product_row(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, w: Tensor, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for one row: bytes alone count, so no matrix unit; sums in float32."""
    from sglang.kernels.ops.norm.norm_triton import norm_product_kernel

    dim, width = x.shape[1], w.shape[0]
    block = next_power_of_2(dim)
    block_n = max(1, min(8, WEIGHTS // block))
    product = torch.empty(1, width, dtype=x.dtype, device=x.device)
    normed = torch.empty(1, dim, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    norm_product_kernel[(cdiv(width, block_n),)](
        x, residual, weight, w, product, normed, total, dim, width, eps, w.stride(0),
        HAS_RESIDUAL=residual is not None, UNIT_OFFSET=unit_offset, BLOCK_N=block_n, BLOCK=block,
        num_warps=max(1, block_n * block // OF_WARP), **early_start(),
    )  # fmt: skip
    return product, normed, total


def _accepts(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, w: Tensor, unit_offset: bool = False
) -> bool:
    one = x.ndim == 2 and x.shape[0] == 1 and x.shape[1] <= MAX_DIM and 0 < w.numel() <= ROW_MAX_ELEMENTS
    same = x.dtype == w.dtype in (torch.bfloat16, torch.float16) and (residual is None or residual.dtype == x.dtype)
    return one and same and w.stride(1) == 1 and fits_triton(x, weight, residual)


norm_product = Op(
    "norm.norm_product",
    triton_impl(norm_product_row, _accepts, "triton_row", kinds={"cuda"}, archs=("sm_90",)),
    # What is left are ops that choose for themselves: nothing falls back.
    Impl("apart", norm_product_apart, kinds={"cuda", "hip"}, needs_device=True),
    Impl("torch", norm_product_torch),
)
