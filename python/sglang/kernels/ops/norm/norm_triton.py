"""One Triton body for every RMS norm: residual add before it, unit offset in it, SiLU gate or 8-bit rows after it."""

import triton
import triton.language as tl

from sglang.kernels.ops.quant.scales_triton import store_quantized


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, residual_ptr, gate_ptr, weight_ptr, out_ptr, total_ptr,
    num_rows, dim, eps,
    x_inner, x_outer_stride, x_inner_stride,
    other_inner, other_outer_stride, other_inner_stride,
    HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    q_ptr=None, scale_ptr=None, scale_row_stride=0, scale_group_stride=0, LARGEST: tl.constexpr = None,
):  # fmt: skip
    """ROWS rows a program, a whole row at once (BLOCK >= dim); the strides of ``other`` belong to residual or gate."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (cols < dim)
    x = tl.load(x_ptr + _row_start(row, x_inner, x_outer_stride, x_inner_stride) + cols, mask=mask, other=0.0)
    dtype = x.dtype
    wide = x.to(tl.float32)
    other = _row_start(row, other_inner, other_outer_stride, other_inner_stride) + cols
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + other, mask=mask, other=0.0)
        total = (wide + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * dim + cols, total, mask=mask)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / dim + eps)
    stored = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0)
    weight = stored.to(tl.float32)
    if UNIT_OFFSET:
        out = (wide * scale * (1.0 + weight)).to(dtype)
    elif stored.dtype != dtype:
        out = (wide * scale * weight).to(dtype)
    else:
        # The reference rounds the normed row before a weight of its dtype multiplies it.
        out = ((wide * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if HAS_GATE:
        gate = tl.load(gate_ptr + other, mask=mask, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) * (gate / (1.0 + tl.exp(-gate)))).to(dtype)
    tl.store(out_ptr + row * dim + cols, out, mask=mask)
    if LARGEST is not None:
        first = tl.program_id(0) * ROWS
        store_quantized(
            out, q_ptr, scale_ptr, first, 0, num_rows, dim, scale_row_stride, scale_group_stride, LARGEST, BLOCK
        )
