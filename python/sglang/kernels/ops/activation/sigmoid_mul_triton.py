"""A sigmoid gate, ROWS whole rows a program."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead


@triton.jit
def gated(x, gate):
    """``x`` times the sigmoid of ``gate``, both in x's dtype; the reference rounds the sigmoid before it multiplies."""
    sigmoid = (1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))).to(x.dtype)
    return (x.to(tl.float32) * sigmoid.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def sigmoid_mul_kernel(
    x_ptr, gate_ptr, out_ptr, num_rows, width,
    x_inner, x_outer_stride, x_inner_stride, gate_inner, gate_outer_stride, gate_inner_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_ahead()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (cols < width)
    x_at = (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    gate_at = (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_inner_stride
    x = tl.load(x_ptr + x_at + cols, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + gate_at + cols, mask=mask, other=0.0)
    tl.store(out_ptr + row * width + cols, gated(x, gate), mask=mask)
