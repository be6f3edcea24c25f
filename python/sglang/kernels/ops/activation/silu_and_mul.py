"""SwiGLU's activation: SiLU of the first half times the second half."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, rows_of, triton_impl
from sglang.kernels.ops.quant import group_fp8
from sglang.kernels.spec import Impl, Op


def silu_and_mul_torch(x: Tensor, limit: float | None = None) -> Tensor:
    """``silu(x[..., :I]) * x[..., I:]``; with a ``limit``, of the gate up to it and of the rest within +-limit.

    x [..., 2I] float -> [..., I] in x's dtype. Shazeer 2020 (SwiGLU), without the projections; the limit as in
    DeepSeek V4.
    """
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def limit_option(limit: float | None) -> dict[str, float]:
    """What a Triton body that clamps is given; a limit is part of its code."""
    return {} if limit is None else {"LIMIT": limit}


def silu_and_mul_quantized_torch(x: Tensor, dtype: torch.dtype, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """``activation.silu_and_mul`` and its rows through ``quant.quantize_groups``.

    x [N, 2I] float with I a multiple of 128, dtype an 8-bit float -> q [N, I] dtype, scale [N, I / 128] float32.
    """
    return group_fp8.quantize_groups_torch(silu_and_mul_torch(x, limit), dtype)


def silu_and_mul_triton(x: Tensor, limit: float | None = None) -> Tensor:
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    return _launch(x, out, limit_option(limit))


def silu_and_mul_quantized_triton(x: Tensor, dtype: torch.dtype, limit: float | None = None) -> tuple[Tensor, Tensor]:
    q, scale = group_fp8.empty_quantized(x.shape[0], x.shape[1] // 2, dtype, x.device)
    strides = {"scale_row_stride": scale.stride(0), "scale_group_stride": scale.stride(1)}
    _launch(x, q, {"LARGEST": torch.finfo(dtype).max, "scale_ptr": scale, **strides, **limit_option(limit)})
    return q, scale


def _launch(x: Tensor, out: Tensor, options: dict[str, Any]) -> Tensor:
    from sglang.kernels.ops.activation.silu_and_mul_triton import silu_and_mul_kernel

    width = out.shape[-1]
    rows = rows_of(x)
    assert rows is not None
    if out.numel():
        block = min(2048, next_power_of_2(width))
        blocks = cdiv(width, block)
        silu_and_mul_kernel[(rows.num_rows * blocks,)](
            x, out, width, *rows[1:], blocks, BLOCK=block, **options, num_warps=4, **early_start()
        )
    return out


def _accepts(x: Tensor, limit: float | None = None) -> bool:
    return x.dtype in FLOATS and x.shape[-1] % 2 == 0 and rows_of(x) is not None


def _accepts_quantized(x: Tensor, dtype: torch.dtype, limit: float | None = None) -> bool:
    whole = x.ndim == 2 and x.shape[1] % (2 * group_fp8.GROUP) == 0
    return whole and dtype in group_fp8.FP8_DTYPES and _accepts(x, limit)


silu_and_mul = Op(
    "activation.silu_and_mul", triton_impl(silu_and_mul_triton, _accepts), Impl("torch", silu_and_mul_torch)
)
silu_and_mul_quantized = Op(
    "activation.silu_and_mul_quantized",
    triton_impl(silu_and_mul_quantized_triton, _accepts_quantized),
    Impl("torch", silu_and_mul_quantized_torch),
)
