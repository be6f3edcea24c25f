"""Rotation of queries and keys in one launch: a program takes one token and a block of heads of both."""

import triton
import triton.language as tl


@triton.jit
def load_pairs(at, mask, HALF: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of the HALF pairs of each row at ``at`` [R, 1]: two [R, BLOCK >= HALF], zero where not in ``mask``.

    Interleaved pairs are read as they lie: alone, every second element would touch each sector of memory twice.
    """
    if IS_NEOX:
        pair = tl.arange(0, BLOCK)[None, :]
        inside = mask & (pair < HALF)
        x, y = tl.load(at + pair, mask=inside, other=0.0), tl.load(at + HALF + pair, mask=inside, other=0.0)
    else:
        col = tl.arange(0, 2 * BLOCK)[None, :]
        row = tl.load(at + col, mask=mask & (col < 2 * HALF), other=0.0)
        x, y = tl.split(tl.reshape(row, (row.shape[0], BLOCK, 2)))
    return x, y


@triton.jit
def store_pairs(to, x, y, mask, HALF: tl.constexpr, IS_NEOX: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs [R, BLOCK] back into the rows at ``to`` [R, 1], as ``load_pairs`` reads them."""
    if IS_NEOX:
        pair = tl.arange(0, BLOCK)[None, :]
        inside = mask & (pair < HALF)
        tl.store(to + pair, x, mask=inside)
        tl.store(to + HALF + pair, y, mask=inside)
    else:
        col = tl.arange(0, 2 * BLOCK)[None, :]
        tl.store(to + col, tl.interleave(x, y), mask=mask & (col < 2 * HALF))


@triton.jit
def turn(x, y, cos, sin, dtype: tl.constexpr):
    """Pairs turned by their angles in float32, as ``dtype``."""
    a, b = x.to(tl.float32), y.to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


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
    # A head is of q or of k: of the two masked loads one gives the values and the other zeros.
    q_x, q_y = load_pairs(q_ptr + q_at, is_q, HALF, IS_NEOX, BLOCK)
    k_x, k_y = load_pairs(k_ptr + k_at, is_k, HALF, IS_NEOX, BLOCK)
    x, y = turn(q_x + k_x, q_y + k_y, cos, sin, q_ptr.dtype.element_ty)
    store_pairs(q_out_ptr + q_to, x, y, is_q, HALF, IS_NEOX, BLOCK)
    store_pairs(k_out_ptr + k_to, x, y, is_k, HALF, IS_NEOX, BLOCK)
    if REST > 0:
        cols = 2 * HALF + tl.arange(0, REST)[None, :]
        left = cols < head_dim
        _copy_head_block(
            q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_at, k_at, q_to, k_to, cols, is_q & left, is_k & left
        )  # fmt: skip
