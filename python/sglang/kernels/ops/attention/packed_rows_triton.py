"""Triton bodies that write rows of compressed attention to their cache, and what kernels of such rows share."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kv_cache_triton import to_cache

NAN_EXPONENT = tl.constexpr(255)
# NaN in FNUZ, where OCP has minus zero.
FNUZ_NAN = tl.constexpr(0x80)
SMALLEST = tl.constexpr(1e-8)
GROUP = tl.constexpr(64)


@triton.jit
def exponent_to_scale(exponents):
    """Two to the power ``exponents - 127`` in float32; infinity for NAN_EXPONENT, whose values are 0."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_bits(at, values, mask, DTYPE: tl.constexpr):
    """Store float32 ``values``, none too large, as 8-bit floats DTYPE at pointers to bytes."""
    bits = values.to(DTYPE).to(tl.uint8, bitcast=True)
    if DTYPE == tl.float8e4b8:
        # Whatever the conversion makes of minus zero, and of what rounds to it.
        bits = tl.where(bits == FNUZ_NAN, 0, bits).to(tl.uint8)
    tl.store(at, bits, mask=mask)


@triton.jit
def _store_groups(row, at, scale_at, PLAIN: tl.constexpr, DTYPE: tl.constexpr):
    """Store the first PLAIN numbers of a row as groups with an exponent each.

    The power is found by bits, so that no division rounds: the largest number of DTYPE is 1.75 * 2 ** 8, in FNUZ
    1.875 * 2 ** 7.
    """
    fnuz: tl.constexpr = DTYPE == tl.float8e4b8
    power: tl.constexpr = 7 if fnuz else 8
    fraction: tl.constexpr = 0x700000 if fnuz else 0x600000
    width: tl.constexpr = min(row.shape[0], GROUP)
    group = tl.arange(0, row.shape[0] // width)
    column = group[:, None] * width + tl.arange(0, width)[None, :]
    groups = tl.where(column < PLAIN, tl.reshape(row, [row.shape[0] // width, width]), 0.0)
    size = tl.abs(groups)
    finite = size < float("inf")
    broken = tl.max((~finite).to(tl.int32), 1)
    largest = tl.maximum(tl.max(tl.where(finite, size, 0.0), 1), SMALLEST).to(tl.int32, bitcast=True)
    exponents = (largest >> 23) - power + ((largest & 0x7FFFFF) > fraction).to(tl.int32)
    shrink = ((254 - exponents) << 23).to(tl.float32, bitcast=True)
    values = tl.where((broken > 0)[:, None], 0.0, groups * shrink[:, None])
    _store_bits(at + column, values, column < PLAIN, DTYPE)
    exponents = tl.where(broken > 0, NAN_EXPONENT, exponents).to(tl.uint8)
    tl.store(scale_at + group, exponents, mask=group * width < PLAIN)


@triton.jit
def _store_key(key, column, at, scale_at, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Store a key with its scale; divisions round as the reference's do."""
    most: tl.constexpr = 240.0 if DTYPE == tl.float8e4b8 else 448.0
    size = tl.where(column < DIM, tl.abs(key), 0.0)
    finite = size < float("inf")
    broken = tl.max((~finite).to(tl.int32), 0)
    largest = tl.maximum(tl.max(tl.where(finite, size, 0.0), 0), SMALLEST)
    scale = tl.div_rn(largest, tl.full([], most, tl.float32))
    values = tl.div_rn(key, tl.zeros_like(key) + scale)
    values = tl.where(broken > 0, 0.0, tl.minimum(tl.maximum(values, -most), most))
    _store_bits(at + column, values, column < DIM, DTYPE)
    tl.store(scale_at, tl.where(broken > 0, float("nan"), scale))


@triton.jit
def store_row(
    row, row_id, cache_ptr, scales_ptr, page_stride, scale_page_stride,
    KIND: tl.constexpr, PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, NUM_SCALES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Store a row [BLOCK] of DIM numbers at ``row_id`` int64 of a cache: KIND 0 plain, 1 rows, 2 keys."""
    column = tl.arange(0, row.shape[0])
    at = cache_ptr + row_id // PER_PAGE * page_stride + row_id % PER_PAGE * WIDTH
    if KIND == 0:
        tl.store(at + column, to_cache(row, cache_ptr), mask=column < DIM)
    else:
        dtype: tl.constexpr = cache_ptr.dtype.element_ty
        bytes_at = at.to(tl.pointer_type(tl.uint8))
        scale_at = scales_ptr + row_id // PER_PAGE * scale_page_stride + row_id % PER_PAGE * NUM_SCALES
        wide = row.to(tl.float32)
        if KIND == 1:
            plain: tl.constexpr = 2 * DIM - WIDTH
            _store_groups(wide, bytes_at, scale_at, plain, dtype)
            tail_at = (bytes_at + plain).to(tl.pointer_type(tl.bfloat16)) + (column - plain)
            tl.store(tail_at, row.to(tl.bfloat16), mask=(column >= plain) & (column < DIM))
        else:
            _store_key(wide, column, bytes_at, scale_at, DIM, dtype)
