"""What every kernel that writes 8-bit rows does with a group of 128 numbers."""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)


# The bits of 1e-10, the least size that a scale is made of.
LEAST = tl.constexpr(0x2EDBE6FF)


@triton.jit
def quantize(groups, LARGEST: tl.constexpr):
    """groups [G, 128] float32 -> the numbers to be rounded to 8 bits, and the scale of each group; NaN with one NaN."""
    # The bits of sizes are in the order of the sizes, and those of NaN are above: a maximum of floats would drop it.
    bits = tl.max(tl.abs(groups).to(tl.int32, bitcast=True), axis=1)
    scale = tl.maximum(bits, LEAST).to(tl.float32, bitcast=True)
    # Divisions round as the reference's do: one bit decides which 8-bit value is nearest. A quotient is past LARGEST by
    # rounding alone, and rounds to LARGEST.
    scale = tl.div_rn(scale, tl.full(scale.shape, LARGEST, tl.float32))
    return tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape)), scale


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
