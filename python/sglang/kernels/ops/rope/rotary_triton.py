"""Rotation of queries and keys in one launch: a program takes one token and a block of heads of both."""

import triton
import triton.language as tl


@triton.jit
def _copy_head_block(q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_at, k_at, q_to, k_to, cols, q_mask, k_mask):
    tl.store(q_out_ptr + q_to + cols, tl.load(q_ptr + q_at + cols, mask=q_mask, other=0.0), mask=q_mask)
    tl.store(k_out_ptr + k_to + cols, tl.load(k_ptr + k_at + cols, mask=k_mask, other=0.0), mask=k_mask)


@triton.jit
def rotary_kernel(
    positions_ptr, q_ptr, k_ptr, cache_ptr, q_out_ptr, k_out_ptr,
    q_heads, k_heads, head_dim, head_blocks,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, cache_stride,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Pairs [HEADS, BLOCK >= HALF] are turned, the REST >= head_dim - 2 * HALF columns behind them copied."""
    pid = tl.program_id(0)
    token = (pid // head_blocks).to(tl.int64)
    head = ((pid % head_blocks) * HEADS + tl.arange(0, HEADS))[:, None]
    k_head = head - q_heads
    is_q, is_k = head < q_heads, (k_head >= 0) & (k_head < k_heads)
    q_at, k_at = token * q_token_stride + head * q_head_stride, token * k_token_stride + k_head * k_head_stride
    q_to, k_to = (token * q_heads + head) * head_dim, (token * k_heads + k_head) * head_dim

    pair = tl.arange(0, BLOCK)[None, :]
    inside = pair < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cache_ptr + position * cache_stride + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(cache_ptr + position * cache_stride + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    first = pair if IS_NEOX else 2 * pair
    second = pair + HALF if IS_NEOX else 2 * pair + 1
    q_mask, k_mask = is_q & inside, is_k & inside
    # A head is of q or of k: of the two masked loads one gives the values and the other zeros.
    a = tl.load(q_ptr + q_at + first, mask=q_mask, other=0.0) + tl.load(k_ptr + k_at + first, mask=k_mask, other=0.0)
    b = tl.load(q_ptr + q_at + second, mask=q_mask, other=0.0) + tl.load(k_ptr + k_at + second, mask=k_mask, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    turned_x, turned_y = (x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(a.dtype)
    tl.store(q_out_ptr + q_to + first, turned_x, mask=q_mask)
    tl.store(q_out_ptr + q_to + second, turned_y, mask=q_mask)
    tl.store(k_out_ptr + k_to + first, turned_x, mask=k_mask)
    tl.store(k_out_ptr + k_to + second, turned_y, mask=k_mask)
    if REST > 0:
        cols = 2 * HALF + tl.arange(0, REST)[None, :]
        left = cols < head_dim
        _copy_head_block(
            q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_at, k_at, q_to, k_to, cols, is_q & left, is_k & left
        )  # fmt: skip
