"""SwiGLU's activation, one block of a row a program."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.quant.scales_triton import store_quantized


@triton.jit
def clamp_above(x, LIMIT: tl.constexpr, dtype):
    """x float32, at most LIMIT rounded to ``dtype``; None is no limit, and what is no number stays."""
    if LIMIT is not None:
        bound = tl.full(x.shape, LIMIT, dtype).to(tl.float32)
        x = tl.where(x > bound, bound, x)
    return x


@triton.jit
def clamp_both(x, LIMIT: tl.constexpr, dtype):
    """The same on either side of zero."""
    if LIMIT is not None:
        x = -clamp_above(-clamp_above(x, LIMIT, dtype), LIMIT, dtype)
    return x


@triton.jit
def silu_and_mul_kernel(
    x_ptr, out_ptr, width, x_inner, x_outer_stride, x_inner_stride, blocks, BLOCK: tl.constexpr,
    LIMIT: tl.constexpr = None,
    scale_ptr=None, scale_row_stride=0, scale_group_stride=0, LARGEST: tl.constexpr = None,
):  # fmt: skip
    """With LARGEST ``out`` is of 8 bits, and ``scale`` takes the scales of its groups."""
    wait_for_kernel_ahead()
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    start = (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    gate = tl.load(x_ptr + start + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + start + width + cols, mask=mask, other=0.0)
    wide = clamp_above(gate.to(tl.float32), LIMIT, gate.dtype)
    # The reference rounds the SiLU before it multiplies.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    rest = clamp_both(up.to(tl.float32), LIMIT, gate.dtype)
    out = (silu * rest).to(gate.dtype)
    if LARGEST is None:
        tl.store(out_ptr + row * width + cols, out, mask=mask)
    else:
        store_quantized(
            out, out_ptr, scale_ptr, row, (pid % blocks) * BLOCK, row + 1, width,
            scale_row_stride, scale_group_stride, LARGEST, BLOCK,
        )  # fmt: skip
