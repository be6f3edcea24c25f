"""One Triton body for every RMS norm: residual add before it, unit offset in it, SiLU gate or 8-bit rows after it."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.quant.scales_triton import store_quantized


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _normed(wide, stored, dim, eps, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """Rows ``wide`` [ROWS, BLOCK] float32, normed with the gain ``stored`` -> ``dtype``."""
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / dim + eps)
    weight = stored.to(tl.float32)
    if UNIT_OFFSET:
        return (wide * scale * (1.0 + weight)).to(dtype)
    elif stored.dtype != dtype:
        return (wide * scale * weight).to(dtype)
    else:
        # The reference rounds the normed row before a weight of its dtype multiplies it.
        return ((wide * scale).to(dtype).to(tl.float32) * weight).to(dtype)


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
    wait_for_kernel_ahead()
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
    out = _normed(wide, tl.load(weight_ptr + cols, mask=cols < dim, other=0.0), dim, eps, dtype, UNIT_OFFSET)
    if HAS_GATE:
        gate = tl.load(gate_ptr + other, mask=mask, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) * (gate / (1.0 + tl.exp(-gate)))).to(dtype)
    tl.store(out_ptr + row * dim + cols, out, mask=mask)
    if LARGEST is not None:
        first = tl.program_id(0) * ROWS
        store_quantized(
            out, q_ptr, scale_ptr, first, 0, num_rows, dim, scale_row_stride, scale_group_stride, LARGEST, BLOCK
        )


@triton.jit
def norm_logits_kernel(
    x_ptr, residual_ptr, weight_ptr, gate_ptr, out_ptr, total_ptr, logits_ptr, q_ptr, scale_ptr,
    num_rows, dim, experts, eps, x_stride, residual_stride, gate_stride, scale_row_stride, scale_group_stride,
    UNIT_OFFSET: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr = None,
):  # fmt: skip
    """grid (blocks of BLOCK_E experts, rows): each norms its row anew, the first writes it; BLOCK >= dim."""
    row = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < dim
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    # Asked for before the norm waits for its row; experts past the end read the last one, and the store drops them.
    gate_at = tl.minimum(expert, experts - 1).to(tl.int64)[:, None] * gate_stride + cols
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0)
    wait_for_kernel_ahead()
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0)
    stored = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    out = _normed(total.to(tl.float32), stored, dim, eps, dtype, UNIT_OFFSET)
    logits = tl.sum(out.to(tl.float32) * gate.to(tl.float32), axis=1)
    tl.store(logits_ptr + row * experts + expert, logits.to(logits_ptr.dtype.element_ty), mask=expert < experts)
    if tl.program_id(0) == 0:
        tl.store(total_ptr + row * dim + cols, total, mask=inside)
        tl.store(out_ptr + row * dim + cols, out, mask=inside)
        if LARGEST is not None:
            store_quantized(
                out, q_ptr, scale_ptr, row, 0, num_rows, dim, scale_row_stride, scale_group_stride, LARGEST, BLOCK
            )


@triton.jit
def norm_product_kernel(
    x_ptr, residual_ptr, weight_ptr, w_ptr, out_ptr, normed_ptr, total_ptr, dim, width, eps, w_stride,
    HAS_RESIDUAL: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks of BLOCK_N outputs): each norms the one row anew, the first writes it; BLOCK >= dim."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < dim
    # Asked for before the norm waits for its row; outputs past the end read the last one, and the store drops them.
    w = tl.load(w_ptr + tl.minimum(n, width - 1).to(tl.int64)[:, None] * w_stride + cols, mask=inside, other=0.0)
    wait_for_kernel_ahead()
    total = tl.load(x_ptr + cols, mask=inside, other=0.0)
    dtype: tl.constexpr = total.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + cols, mask=inside, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    stored = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    normed = _normed(total.to(tl.float32), stored, dim, eps, dtype, UNIT_OFFSET)
    if tl.program_id(0) == 0:
        tl.store(normed_ptr + cols, normed, mask=inside)
        if HAS_RESIDUAL:
            tl.store(total_ptr + cols, total, mask=inside)
    product = tl.sum(w.to(tl.float32) * normed.to(tl.float32), axis=1)
    tl.store(out_ptr + n, product.to(out_ptr.dtype.element_ty), mask=n < width)
