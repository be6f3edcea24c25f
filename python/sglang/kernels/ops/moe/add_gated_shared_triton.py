"""The shared expert's gate, its product with the row, and the sum with the routed experts: one token a program."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead


@triton.jit
def add_gated_shared_kernel(
    routed_ptr, shared_ptr, x_ptr, weight_ptr, out_ptr, hidden, routed_stride, shared_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A whole row at once: BLOCK >= hidden."""
    wait_for_kernel_ahead()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + token * shared_stride + cols, mask=mask, other=0.0)
    routed = tl.load(routed_ptr + token * routed_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dtype = shared.dtype
    # Rounded at every step, as the separate ops do.
    logit = tl.sum(x * weight, axis=0).to(dtype).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-logit))).to(dtype).to(tl.float32)
    gated = (shared.to(tl.float32) * gate).to(dtype).to(tl.float32)
    tl.store(out_ptr + token * hidden + cols, (routed + gated).to(dtype), mask=mask)
