"""Residual add, RMS norm and the router's product of few rows as one op, and these rows in 8 bits where asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import cdiv, early_start, next_power_of_2, triton_impl, warps_for
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm_torch
from sglang.kernels.ops.norm.rmsnorm import fits_triton
from sglang.kernels.ops.quant import group_fp8
from sglang.kernels.spec import Impl, Op

# Numbers of all rows up to which each program norms them again rather than wait for another launch (by reasoning, not
# measured), and experts up to which each has a program of its own.
FEW_NUMBERS = 8192
ONE_PER_PROGRAM = 128


def are_few(x: Tensor) -> bool:
    """Whether x [N, D] has as few rows as this op is for."""
    return 0 < x.numel() <= FEW_NUMBERS


def add_norm_logits_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate: Tensor, logits_dtype: torch.dtype,
    unit_offset: bool = False, dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``norm.fused_add_rms_norm``, and the normed rows' logits.

    x, residual [N, D] and gate [E, D] of one dtype, weight [D] -> normed rows [N, D], the sum [N, D], logits [N, E]:
    as ``moe.router_logits`` in float32, or a plain product in x's dtype. An 8-bit ``dtype`` adds q and scale of the
    normed rows as in ``quant.quantize_groups``; D is a multiple of 128 then.
    """
    normed, total = fused_add_rms_norm_torch(x, residual, weight, eps, unit_offset)
    wide = logits_dtype == torch.float32
    logits = F.linear(normed.float(), gate.float()) if wide else F.linear(normed, gate)
    made = () if dtype is None else group_fp8.quantize_groups_torch(normed, dtype)
    return normed, total, logits, *made


def add_norm_logits_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate: Tensor, logits_dtype: torch.dtype,
    unit_offset: bool = False, dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from sglang.kernels.ops.norm.norm_triton import norm_logits_kernel

    (rows, dim), experts = x.shape, gate.shape[0]
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    logits = torch.empty(rows, experts, dtype=logits_dtype, device=x.device)
    made = () if dtype is None else group_fp8.empty_quantized(rows, dim, dtype, x.device)
    options = {} if dtype is None else {"LARGEST": torch.finfo(dtype).max}
    block, block_e = next_power_of_2(dim), 1 if experts <= ONE_PER_PROGRAM else 2
    norm_logits_kernel[(cdiv(experts, block_e), rows)](
        x, residual, weight, gate, normed, total, logits, *(made or (None, None)), rows, dim, experts, eps,
        x.stride(0), residual.stride(0), gate.stride(0), *(made[1].stride() if made else (0, 0)),
        UNIT_OFFSET=unit_offset, BLOCK_E=block_e, BLOCK=block, num_warps=warps_for(block), **options, **early_start(),
    )  # fmt: skip
    return normed, total, logits, *made


def _accepts(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate: Tensor, logits_dtype: torch.dtype,
    unit_offset: bool = False, dtype: torch.dtype | None = None,
) -> bool:  # fmt: skip
    same = x.dtype == residual.dtype == gate.dtype and logits_dtype in (x.dtype, torch.float32)
    whole = dtype is None or (dtype in group_fp8.FP8_DTYPES and x.shape[1] % group_fp8.GROUP == 0)
    return x.ndim == 2 and are_few(x) and same and whole and gate.stride(1) == 1 and fits_triton(x, weight, residual)


add_norm_logits = Op(
    "norm.add_norm_logits", triton_impl(add_norm_logits_triton, _accepts), Impl("torch", add_norm_logits_torch)
)
