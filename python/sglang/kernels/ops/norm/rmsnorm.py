"""Root-mean-square norms over the last dimension, with and without a residual, in both weight conventions."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, rows_of, triton_impl, warps_for
from sglang.kernels.spec import Impl, Op

# The widest row that one program of the Triton kernel holds.
MAX_TRITON_DIM = 16384


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """``weight * cast(x * rsqrt(mean(x^2) + eps))``, or with ``unit_offset`` the gain ``1 + weight``.

    x [..., D] float, weight [D] -> [..., D] in x's dtype. The product with the weight comes after the cast, as in
    DeepSeek's reference code (it matters in bf16 only); the gain ``1 + weight``, and with 16-bit rows a float32 weight,
    is multiplied before it in float32. Zhang & Sennrich 2019, eq. 4.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype) if weight.dtype == x.dtype else (weight * normed).to(x.dtype)


def gated_rms_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * cast(norm(x)) * silu(gate)``, the gate in float32; x, gate [..., D], weight [D] -> x's dtype."""
    normed = rms_norm_torch(x, weight, eps)
    return (normed.float() * torch.nn.functional.silu(gate.float())).to(x.dtype)


def rows_per_program(dim: int) -> int:
    """Rows of width ``dim`` that one program norms."""
    return max(1, min(16, 1024 // next_power_of_2(dim)))


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, residual: Tensor | None = None,
    total: Tensor | None = None, gate: Tensor | None = None, quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The one Triton body of the norms: new and contiguous; ``total``, contiguous too, receives x + residual.

    Arguments as the references take them, where ``fits_triton`` says yes; residual and gate exclude each other.
    ``quantized``: q [N, D] and scale [N, D / 128] to be filled besides, D a multiple of 128.
    """
    from sglang.kernels.ops.norm.norm_triton import rms_norm_kernel

    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = residual if residual is not None else gate
    x_rows, other_rows = rows_of(x), rows_of(x if other is None else other)
    assert x_rows is not None and other_rows is not None
    if x.numel():
        block, rows = next_power_of_2(dim), rows_per_program(dim)
        options = {}
        if quantized is not None:
            q, scale = quantized
            options = {"LARGEST": torch.finfo(q.dtype).max, "q_ptr": q, "scale_ptr": scale}
            options |= {"scale_row_stride": scale.stride(0), "scale_group_stride": scale.stride(1)}
        rms_norm_kernel[(cdiv(x_rows.num_rows, rows),)](
            x, residual, gate, weight, out, total, x_rows.num_rows, dim, eps, *x_rows[1:], *other_rows[1:],
            HAS_RESIDUAL=residual is not None, HAS_GATE=gate is not None, UNIT_OFFSET=unit_offset,
            ROWS=rows, BLOCK=block, num_warps=warps_for(rows * block), **options, **early_start(),
        )  # fmt: skip
    return out


def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_triton(x, weight, eps, gate=gate)


def fits_triton(x: Tensor, weight: Tensor, other: Tensor | None = None) -> bool:
    """Whether the Triton norm takes these: a weight in x's dtype or float32, dense rows that one program holds."""
    tensors = (x, weight) if other is None else (x, weight, other)
    laid_out = rows_of(x) is not None and (other is None or rows_of(other) is not None)
    same_shape = other is None or other.shape == x.shape
    gain = weight.dtype in (x.dtype, torch.float32) and weight.is_contiguous()
    return (
        laid_out and same_shape and gain and x.shape[-1] <= MAX_TRITON_DIM and all(t.dtype in FLOATS for t in tensors)
    )


def _accepts_plain(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> bool:
    return fits_triton(x, weight)


def _accepts_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> bool:
    return fits_triton(x, weight, gate)


rms_norm = Op("norm.rms_norm", triton_impl(rms_norm_triton, _accepts_plain), Impl("torch", rms_norm_torch))
gated_rms_norm = Op(
    "norm.gated_rms_norm", triton_impl(gated_rms_norm_triton, _accepts_gated), Impl("torch", gated_rms_norm_torch)
)
