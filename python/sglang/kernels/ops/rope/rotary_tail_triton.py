"""Triton body that turns the last columns of heads in pairs, and what kernels that do so beside other work share."""

import triton
import triton.language as tl


@triton.jit
def turn_tail(rows, table_ptr, DIM: tl.constexpr, ROTARY: tl.constexpr, INVERSE: tl.constexpr):
    """rows [R, BLOCK] float32 of one token -> the same, the last ROTARY of DIM columns turned.

    ``table_ptr`` points to the token's ROTARY / 2 cosines and as many sines.
    """
    half: tl.constexpr = rows.shape[1] // 2
    first, second = tl.split(tl.reshape(rows, [rows.shape[0], half, 2]))
    pair = tl.arange(0, half) - (DIM - ROTARY) // 2
    turned = (pair >= 0) & (pair < ROTARY // 2)
    cos = tl.load(table_ptr + pair, mask=turned, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(table_ptr + ROTARY // 2 + pair, mask=turned, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    pairs = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(pairs, [rows.shape[0], rows.shape[1]])


@triton.jit
def rotary_tail_kernel(
    x_ptr, positions_ptr, table_ptr, out_ptr, num_heads, x_stride, x_head_stride, table_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """grid (tokens, head blocks) -> out [N, H, DIM]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < num_heads) & (column < DIM)
    x = tl.load(x_ptr + token * x_stride + head * x_head_stride + column, mask=mask, other=0.0)
    table = table_ptr + tl.load(positions_ptr + token) * table_stride
    turned = turn_tail(x.to(tl.float32), table, DIM, ROTARY, INVERSE)
    tl.store(out_ptr + (token * num_heads + head) * DIM + column, turned.to(x.dtype), mask=mask)
