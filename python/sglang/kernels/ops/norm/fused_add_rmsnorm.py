"""Residual add and RMS norm as one op, in both weight conventions; nothing is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.norm.rmsnorm import fits_triton, rms_norm_torch, rms_norm_triton
from sglang.kernels.spec import Impl, Op


def fused_add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; new ``(rms_norm(s, weight), s)``; x, residual [..., D] of one dtype, weight [D]."""
    total = x + residual
    return rms_norm_torch(total, weight, eps, unit_offset), total


def fused_add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return rms_norm_triton(x, weight, eps, unit_offset, residual, total), total


def _accepts(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> bool:
    return x.dtype == residual.dtype and fits_triton(x, weight, residual)


fused_add_rms_norm = Op(
    "norm.fused_add_rms_norm", triton_impl(fused_add_rms_norm_triton, _accepts), Impl("torch", fused_add_rms_norm_torch)
)
