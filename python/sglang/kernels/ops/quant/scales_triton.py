"""What every kernel that writes 8-bit rows does with a group of 128 numbers."""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)


@triton.jit
def quantize(groups, LARGEST: tl.constexpr):
    """groups [G, 128] float32 -> the numbers to be rounded to 8 bits, and the scale of each group."""
    # Divisions round as the reference's do: one bit decides which 8-bit value is nearest.
    scale = tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-10)
    scale = tl.div_rn(scale, tl.full(scale.shape, LARGEST, tl.float32))
    q = tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape))
    return tl.minimum(tl.maximum(q, -LARGEST), LARGEST), scale


@triton.jit
def store_quantized(
    values, q_ptr, scale_ptr, first_row, first_col, num_rows, width, scale_row_stride, scale_group_stride,
    LARGEST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Quantise values [ROWS, COLS], which stand from ``first_row`` and ``first_col`` on in a matrix of ``width``
    columns, into q, dense, and the scales of its groups; COLS and width are multiples of 128."""
    groups: tl.constexpr = values.numel // GROUP
    q, scale = quantize(tl.reshape(values.to(tl.float32), [groups, GROUP]), LARGEST)
    group = tl.arange(0, groups)
    row = first_row.to(tl.int64) + group // (COLS // GROUP)
    col = first_col + group % (COLS // GROUP) * GROUP
    inside = (row < num_rows) & (col < width)
    at = (row * width + col)[:, None] + tl.arange(0, GROUP)[None, :]
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(scale_ptr + row * scale_row_stride + col // GROUP * scale_group_stride, scale, mask=inside)
