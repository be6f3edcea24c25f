"""Eight-bit floats by groups of 128: quantising rows, and a product of such rows with weights in 128x128 blocks."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.moe.fused_experts_triton import expert_tile, scaled_row
from sglang.kernels.ops.quant.scales_triton import GROUP, quantize


@triton.jit(do_not_specialize=["num_groups", "scale_group_stride"])
def quantize_groups_kernel(
    x_ptr, q_ptr, scale_ptr, num_groups, groups_a_row, row_stride, scale_row_stride, scale_group_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK groups a program, each its own scale."""
    wait_for_kernel_ahead()
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
    wait_for_kernel_ahead()
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


@triton.jit
def one_row_fp8_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, width, k_dim,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row, without matrix units; both scales are multiplied into the row.

    BLOCK_N divides 128, so that the outputs of a program share a row of weight scales.
    """
    wait_for_kernel_ahead()
    first = tl.program_id(0) * BLOCK_N
    column = tl.minimum(first + tl.arange(0, BLOCK_N), width - 1)
    k = tl.arange(0, BLOCK_K)
    w_scale_at = w_scale_ptr + (first // GROUP) * (k_dim // GROUP)
    w_at = w_ptr + column.to(tl.int64)[:, None] * k_dim + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        if EVEN_K:
            w = tl.load(w_at)
            x = tl.load(x_ptr + start + k)
            scale = tl.load(x_scale_ptr + group) * tl.load(w_scale_at + group)
        else:
            inside, known = start + k < k_dim, group < k_dim // GROUP
            w = tl.load(w_at, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptr + start + k, mask=inside, other=0.0)
            scale = tl.load(x_scale_ptr + group, mask=known, other=0.0)
            scale *= tl.load(w_scale_at + group, mask=known, other=0.0)
        acc += w.to(tl.float32) * scaled_row(x.to(tl.float32), scale, BLOCK_K)[None, :]
        w_at += BLOCK_K
    n = first + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + n, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["rows"])
def few_rows_fp8_linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, rows, width, k_dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows, at most BLOCK_M; GROUPS groups of columns are multiplied at once, and added last."""
    wait_for_kernel_ahead()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    group, k = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    groups = k_dim // GROUP
    row, column = tl.minimum(m, rows - 1), tl.minimum(n, width - 1).to(tl.int64)
    x_at = x_ptr + row[None, :, None] * k_dim + group[:, None, None] * GROUP + k[None, None, :]
    w_at = w_ptr + column[None, None, :] * k_dim + group[:, None, None] * GROUP + k[None, :, None]
    x_scale_at = x_scale_ptr + row[None, :] * groups + group[:, None]
    w_scale_at = w_scale_ptr + (column // GROUP)[None, :] * groups + group[:, None]
    acc = tl.zeros([GROUPS, BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, groups, GROUPS):
        if EVEN_K:
            x, w, x_scale, w_scale = tl.load(x_at), tl.load(w_at), tl.load(x_scale_at), tl.load(w_scale_at)
        else:
            here = start + group < groups
            x = tl.load(x_at, mask=here[:, None, None], other=0.0)
            w = tl.load(w_at, mask=here[:, None, None], other=0.0)
            x_scale = tl.load(x_scale_at, mask=here[:, None], other=0.0)
            w_scale = tl.load(w_scale_at, mask=here[:, None], other=0.0)
        acc += tl.dot(x, w) * (x_scale[:, :, None] * w_scale[:, None, :])
        x_at += GROUPS * GROUP
        w_at += GROUPS * GROUP
        x_scale_at += GROUPS
        w_scale_at += GROUPS
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * width + n[None, :], out, mask=(m < rows)[:, None] & (n < width)[None, :])
