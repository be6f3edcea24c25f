"""Residual add, RMS norm and 8-bit rows by groups of 128 as one op, for the products of 8-bit weights that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm_torch
from sglang.kernels.ops.norm.rmsnorm import fits_triton, rms_norm_torch, rms_norm_triton
from sglang.kernels.ops.quant import group_fp8
from sglang.kernels.spec import Impl, Op


def rms_norm_quantized_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``norm.fused_add_rms_norm``, and its normed rows through ``quant.quantize_groups``.

    x [N, D] float with D a multiple of 128, residual alike or None for nothing, dtype an 8-bit float -> normed rows
    [N, D] in x's dtype, these as q [N, D] dtype and scale [N, D / 128] float32, and the sum: x itself without a
    residual, else new.
    """
    if residual is None:
        normed, total = rms_norm_torch(x, weight, eps), x
    else:
        normed, total = fused_add_rms_norm_torch(x, residual, weight, eps)
    return normed, *group_fp8.quantize_groups_torch(normed, dtype), total


def rms_norm_quantized_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale = group_fp8.empty_quantized(x.shape[0], x.shape[1], dtype, x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return rms_norm_triton(x, weight, eps, False, residual, total, quantized=(q, scale)), q, scale, total


def _accepts(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> bool:
    same = residual is None or residual.dtype == x.dtype
    whole = x.ndim == 2 and x.shape[1] % group_fp8.GROUP == 0 and dtype in group_fp8.FP8_DTYPES
    return same and whole and fits_triton(x, weight, residual)


rms_norm_quantized = Op(
    "norm.rms_norm_quantized", triton_impl(rms_norm_quantized_triton, _accepts), Impl("torch", rms_norm_quantized_torch)
)
