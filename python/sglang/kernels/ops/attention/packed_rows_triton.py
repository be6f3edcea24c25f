"""Triton bodies that write rows of compressed attention to their cache, and what kernels of such rows share."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kv_cache_triton import to_cache

NAN_EXPONENT = tl.constexpr(255)
# NaN in FNUZ, where OCP has minus zero.
FNUZ_NAN = tl.constexpr(0x80)
SMALLEST = tl.constexpr(1e-8)


@triton.jit
def exponent_to_scale(exponents):
    """Two to the power ``exponents - 127`` in float32; infinity for NAN_EXPONENT, whose values are 0."""
    return (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_bits(at, values, mask, DTYPE: tl.constexpr):
    """Store float32 ``values``, none too large, as 8-bit floats DTYPE at pointers to bytes."""
    bits = values.to(DTYPE).to(tl.uint8, bitcast=True)
    if DTYPE == tl.float8e4b8:
        # Whatever the conversion makes of minus zero, and of what rounds to it.
        bits = tl.where(bits == FNUZ_NAN, 0, bits).to(tl.uint8)
    tl.store(at, bits, mask=mask)


@triton.jit
def store_groups(groups, column, at, scale_at, PLAIN: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Store groups [G, COLUMNS] float32 of one row with an exponent each; ``at`` and ``scale_at`` point to bytes.

    The power is found by bits, so that no division rounds: the largest number of DTYPE is 1.75 * 2 ** 8, in FNUZ
    1.875 * 2 ** 7.
    """
    fnuz: tl.constexpr = DTYPE == tl.float8e4b8
    power: tl.constexpr = 7 if fnuz else 8
    fraction: tl.constexpr = 0x700000 if fnuz else 0x600000
    size = tl.abs(groups)
    finite = size < float("inf")
    broken = tl.max((~finite).to(tl.int32), 1)
    largest = tl.maximum(tl.max(tl.where(finite, size, 0.0), 1), SMALLEST).to(tl.int32, bitcast=True)
    exponents = (largest >> 23) - power + ((largest & 0x7FFFFF) > fraction).to(tl.int32)
    shrink = ((254 - exponents) << 23).to(tl.float32, bitcast=True)
    values = tl.where((broken > 0)[:, None], 0.0, groups * shrink[:, None])
    store_bits(at + column, values, column < PLAIN, DTYPE)
    group = tl.arange(0, groups.shape[0])
    exponents = tl.where(broken > 0, NAN_EXPONENT, exponents).to(tl.uint8)
    tl.store(scale_at + group, exponents, mask=group * COLUMNS < PLAIN)


@triton.jit
def store_key(key, column, at, scale_at, PLAIN: tl.constexpr, DTYPE: tl.constexpr):
    """Store a key [1, COLUMNS] float32 with its scale; divisions round as the reference's do."""
    most: tl.constexpr = 240.0 if DTYPE == tl.float8e4b8 else 448.0
    size = tl.abs(key)
    finite = size < float("inf")
    broken = tl.max((~finite).to(tl.int32), 1)
    largest = tl.maximum(tl.max(tl.where(finite, size, 0.0), 1), SMALLEST)
    scale = tl.div_rn(largest, tl.full(largest.shape, most, tl.float32))
    values = tl.div_rn(key, tl.broadcast_to(scale[:, None], key.shape))
    values = tl.where((broken > 0)[:, None], 0.0, tl.minimum(tl.maximum(values, -most), most))
    store_bits(at + column, values, column < PLAIN, DTYPE)
    tl.store(scale_at + tl.arange(0, 1), tl.where(broken > 0, float("nan"), scale))


@triton.jit
def store_packed_rows_kernel(
    rows_ptr, ids_ptr, cache_ptr, scales_ptr, row_stride, page_stride, scale_page_stride,
    PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, NUM_SCALES: tl.constexpr, PLAIN: tl.constexpr, TAIL: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SCALES: tl.constexpr,
    IS_KEYS: tl.constexpr,
):  # fmt: skip
    """grid (rows): one row each; the last TAIL columns are stored as bfloat16 behind the first PLAIN ones."""
    row = tl.program_id(0).to(tl.int64)
    row_id = tl.load(ids_ptr + row).to(tl.int64)
    page, place = row_id // PER_PAGE, row_id % PER_PAGE
    column = tl.arange(0, GROUPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    groups = tl.load(rows_ptr + row * row_stride + column, mask=column < PLAIN, other=0.0)
    at = cache_ptr + page * page_stride + place * WIDTH
    if not HAS_SCALES:
        tl.store(at + column, to_cache(groups, cache_ptr), mask=column < PLAIN)
    else:
        dtype: tl.constexpr = cache_ptr.dtype.element_ty
        bytes_at = at.to(tl.pointer_type(tl.uint8))
        scale_at = scales_ptr + page * scale_page_stride + place * NUM_SCALES
        if IS_KEYS:
            store_key(groups.to(tl.float32), column, bytes_at, scale_at, PLAIN, dtype)
        else:
            store_groups(groups.to(tl.float32), column, bytes_at, scale_at, PLAIN, COLUMNS, dtype)
            lane = tl.arange(0, BLOCK_T)
            tail = tl.load(rows_ptr + row * row_stride + PLAIN + lane, mask=lane < TAIL)
            tail_at = (bytes_at + PLAIN).to(tl.pointer_type(tl.bfloat16))
            tl.store(tail_at + lane, tail.to(tl.bfloat16), mask=lane < TAIL)
