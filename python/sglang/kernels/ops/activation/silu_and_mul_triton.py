"""SwiGLU's activation, one block of a row a program."""

import triton
import triton.language as tl


@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, width, x_inner, x_outer_stride, x_inner_stride, blocks, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    start = (row // x_inner) * x_outer_stride + (row % x_inner) * x_inner_stride
    gate = tl.load(x_ptr + start + cols, mask=mask, other=0.0)
    up = tl.load(x_ptr + start + width + cols, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # The reference rounds the SiLU before it multiplies.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + cols, (silu * up.to(tl.float32)).to(gate.dtype), mask=mask)
