"""Triton bodies that write rows at slots of the cache and read slots from the request table."""

import triton
import triton.language as tl


@triton.jit
def to_cache(values, pointer):
    """``values`` in the dtype that ``pointer`` points to; 8-bit floats saturate, and NaN stays NaN."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype.is_fp8():
        largest: tl.constexpr = 240.0 if dtype == tl.float8e4b8 else 448.0
        # Not tl.clamp: it takes NaN for a bound.
        wide = values.to(tl.float32)
        values = tl.where(wide > largest, largest, tl.where(wide < -largest, -largest, wide))
    return values.to(dtype)


@triton.jit
def write_rows_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    k_stride, k_head_stride, v_stride, v_head_stride, k_cache_stride, v_cache_stride,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (tokens, 2): the key row and the value row of a token; heads may be strided, and lie dense in the cache."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        at = k_ptr + token * k_stride + (column // K_DIM) * k_head_stride + column % K_DIM
        row = to_cache(tl.load(at, mask=column < K_WIDTH), k_cache_ptr)
        tl.store(k_cache_ptr + slot * k_cache_stride + column, row, mask=column < K_WIDTH)
    else:
        at = v_ptr + token * v_stride + (column // V_DIM) * v_head_stride + column % V_DIM
        row = to_cache(tl.load(at, mask=column < V_WIDTH), v_cache_ptr)
        tl.store(v_cache_ptr + slot * v_cache_stride + column, row, mask=column < V_WIDTH)


# The host sends rows, starts and bounds in one piece: each starts at any multiple of 8 bytes.
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "indptr_ptr"])
def gather_slots_kernel(
    table_ptr, rows_ptr, starts_ptr, indptr_ptr, out_ptr, table_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (requests, programs): the programs of a request walk its span a block each in turn."""
    request = tl.program_id(0)
    first = tl.load(indptr_ptr + request)
    length = (tl.load(indptr_ptr + request + 1) - first).to(tl.int32)
    at = table_ptr + tl.load(rows_ptr + request) * table_stride + tl.load(starts_ptr + request)
    for block in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        position = block + tl.arange(0, BLOCK)
        slots = tl.load(at + position, mask=position < length)
        tl.store(out_ptr + first + position, slots.to(tl.int64), mask=position < length)
