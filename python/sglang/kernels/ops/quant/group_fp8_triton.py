"""Eight-bit floats by groups of 128: quantising rows, and a product of such rows with weights in 128x128 blocks."""

import triton
import triton.language as tl

from sglang.kernels.ops.moe.fused_experts_triton import expert_tile
from sglang.kernels.ops.quant.scales_triton import GROUP, quantize


@triton.jit(do_not_specialize=["num_groups", "scale_group_stride"])
def quantize_groups_kernel(
    x_ptr, q_ptr, scale_ptr, num_groups, groups_a_row, row_stride, scale_row_stride, scale_group_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK groups a program, each its own scale."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, GROUP)[None, :]
    mask = (group < num_groups)[:, None]
    start = (group // groups_a_row) * row_stride + (group % groups_a_row) * GROUP
    x = tl.load(x_ptr + start[:, None] + lane, mask=mask, other=0.0).to(tl.float32)
    q, scale = quantize(x, LARGEST)
    tl.store(q_ptr + group[:, None] * GROUP + lane, q.to(q_ptr.dtype.element_ty), mask=mask)
    scale_at = (group // groups_a_row) * scale_row_stride + (group % groups_a_row) * scale_group_stride
    tl.store(scale_ptr + scale_at, scale, mask=group < num_groups)


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def block_fp8_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, rows, width, k_dim, x_scale_stride, x_scale_step, row_tiles, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of x [rows, k_dim] times w [width, k_dim] transposed; GROUP_M row tiles share weights in the cache."""
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles
    first = pid // in_group * GROUP_M
    size = tl.minimum(row_tiles - first, GROUP_M)
    row = (first + (pid % in_group) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert_tile(
        x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, tl.minimum(row, rows - 1), row < rows, 0,
        (pid % in_group) // size, width, k_dim, k_dim, x_scale_stride, x_scale_step, 0, k_dim,
        1, False, True, True, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
