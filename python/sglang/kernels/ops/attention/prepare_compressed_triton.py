"""Triton body that norms and turns the queries of a token, and norms, turns and stores its row."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.packed_rows_triton import store_row
from sglang.kernels.ops.rope.rotary_tail_triton import turn_tail


@triton.jit
def prepare_compressed_kernel(
    q_ptr, kv_ptr, positions_ptr, table_ptr, norm_ptr, ids_ptr, cache_ptr, scales_ptr, out_ptr,
    eps, num_heads, q_stride, q_head_stride, kv_stride, table_stride, page_stride, scale_page_stride,
    KIND: tl.constexpr, PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, NUM_SCALES: tl.constexpr, DIM: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """grid (tokens, head blocks + 1): the last program of a token stores its row."""
    token = tl.program_id(0).to(tl.int64)
    table = table_ptr + tl.load(positions_ptr + token) * table_stride
    column = tl.arange(0, BLOCK)[None, :]
    if tl.program_id(1) + 1 < tl.num_programs(1):
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < num_heads) & (column < DIM)
        q = tl.load(q_ptr + token * q_stride + head * q_head_stride + column, mask=mask, other=0.0)
        wide = q.to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
        turned = turn_tail(wide, table, DIM, ROTARY, False)
        tl.store(out_ptr + (token * num_heads + head) * DIM + column, turned.to(q.dtype), mask=mask)
    else:
        row = tl.load(kv_ptr + token * kv_stride + column, mask=column < DIM, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
        row *= tl.rsqrt(tl.sum(row * row, 1) / DIM + eps)[:, None]
        stored = tl.reshape(turn_tail(row * weight, table, DIM, ROTARY, False), [BLOCK])
        store_row(
            stored, tl.load(ids_ptr + token), cache_ptr, scales_ptr, page_stride, scale_page_stride,
            KIND, PER_PAGE, WIDTH, NUM_SCALES, DIM,
        )  # fmt: skip
