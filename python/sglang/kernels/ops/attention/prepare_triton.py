"""Triton bodies that make a step's queries and cache rows from its projections: norms, rotation, placement, writes."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.attention.kv_cache_triton import to_cache
from sglang.kernels.ops.rope.rotary_triton import load_pairs, store_pairs, turn


@triton.jit
def _angles(positions_ptr, table_ptr, token, table_stride, pair, HALF: tl.constexpr):
    """Cosines and sines of the token's position for each pair."""
    at = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * table_stride + pair
    cos = tl.load(at, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(at + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def prepare_mla_kernel(
    q_ptr, q_out_ptr, kv_ptr, positions_ptr, table_ptr, weight_ptr, cache_ptr, slots_ptr, nope_ptr, w_ptr, latent_ptr,
    heads, blocks, head_blocks, rank, nope, w_stride, w_row_stride, eps,
    q_stride, q_head_stride, out_stride, out_head_stride, kv_stride, table_stride, cache_stride,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, RANK: tl.constexpr,
    TILES: tl.constexpr, NOPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grid (tokens * blocks): one block for a token's cache row, one for each HEADS heads of its queries, and TILES of
    COLUMNS columns for each head's other part [nope] times w [nope, rank].

    q and q_out point at the rotated part of the first head and may be one, nope_ptr and latent_ptr at the other part
    and at what takes the product; RANK >= rank, PAIRS >= HALF, NOPE >= nope.
    """
    wait_for_kernel_ahead()
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pair = tl.arange(0, PAIRS)[None, :]
    cos, sin = _angles(positions_ptr, table_ptr, token, table_stride, pair, HALF)
    if block == 0:
        dtype: tl.constexpr = kv_ptr.dtype.element_ty
        row = cache_ptr + tl.load(slots_ptr + token).to(tl.int64) * cache_stride
        cols = tl.arange(0, RANK)
        latent = tl.load(kv_ptr + token * kv_stride + cols, mask=cols < rank, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=cols < rank, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(latent * latent, axis=0) / rank + eps)
        # The norm rounds before the weight multiplies.
        normed = ((latent * scale).to(dtype).to(tl.float32) * weight).to(dtype)
        tl.store(row + cols, to_cache(normed, cache_ptr), mask=cols < rank)
        k_x, k_y = load_pairs(kv_ptr + token * kv_stride + rank, True, HALF, IS_NEOX, PAIRS)
        k_x, k_y = turn(k_x, k_y, cos, sin, dtype)
        store_pairs(row + rank, to_cache(k_x, cache_ptr), to_cache(k_y, cache_ptr), True, HALF, IS_NEOX, PAIRS)
    elif block <= head_blocks:
        head = ((block - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        x, y = load_pairs(q_ptr + token * q_stride + head * q_head_stride, head < heads, HALF, IS_NEOX, PAIRS)
        x, y = turn(x, y, cos, sin, q_ptr.dtype.element_ty)
        # In place, every warp must have read its pairs before any writes one.
        tl.debug_barrier()
        to = q_out_ptr + token * out_stride + head * out_head_stride
        store_pairs(to, x, y, head < heads, HALF, IS_NEOX, PAIRS)
    elif TILES:
        tile = block - 1 - head_blocks
        own, col = tile // TILES, tile % TILES * COLUMNS + tl.arange(0, COLUMNS)
        n = tl.arange(0, NOPE)
        w_at = w_ptr + own.to(tl.int64) * w_stride + n[:, None] * w_row_stride + col[None, :]
        w = tl.load(w_at, mask=(n < nope)[:, None] & (col < rank)[None, :], other=0.0).to(tl.float32)
        part = tl.load(nope_ptr + token * q_stride + own * q_head_stride + n, mask=n < nope, other=0.0).to(tl.float32)
        product = tl.sum(part[:, None] * w, axis=0).to(latent_ptr.dtype.element_ty)
        tl.store(latent_ptr + token * out_stride + own * out_head_stride + col, product, mask=col < rank)


@triton.jit
def _norm_and_turn(
    at, to, out_ptr, weight_ptr, cos, sin, mask, dim, eps,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr, PAIRS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows [R, dim] at ``at`` [R, 1], normed with gain 1 + weight, their first 2 * HALF columns turned, stored at
    ``to`` [R, 1]."""
    dtype = at.dtype.element_ty
    cols = tl.arange(0, DIM)[None, :]
    row = tl.load(at + cols, mask=mask & (cols < dim), other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=1, keep_dims=True) / dim + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)
    passed = (row * scale * (1.0 + weight)).to(dtype)
    tl.store(to + cols, to_cache(passed, out_ptr), mask=mask & (cols >= 2 * HALF) & (cols < dim))
    x, y = load_pairs(at, mask, HALF, IS_NEOX, PAIRS)
    x_weight, y_weight = load_pairs(weight_ptr, True, HALF, IS_NEOX, PAIRS)
    # As the separate ops do: the normed values are rounded before they are turned.
    x = (x.to(tl.float32) * scale * (1.0 + x_weight.to(tl.float32))).to(dtype)
    y = (y.to(tl.float32) * scale * (1.0 + y_weight.to(tl.float32))).to(dtype)
    x, y = turn(x, y, cos, sin, dtype)
    store_pairs(to, to_cache(x, out_ptr), to_cache(y, out_ptr), mask, HALF, IS_NEOX, PAIRS)


@triton.jit
def prepare_gqa_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, table_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    heads, kv_heads, dim, value_dim, eps, q_blocks, k_blocks,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    k_cache_stride, v_cache_stride, table_stride,
    HALF: tl.constexpr, IS_NEOX: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """grid (tokens * blocks), HEADS heads a block: of each token queries, then key rows, then value rows."""
    wait_for_kernel_ahead()
    blocks = q_blocks + 2 * k_blocks
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pair = tl.arange(0, PAIRS)[None, :]
    cos, sin = _angles(positions_ptr, table_ptr, token, table_stride, pair, HALF)
    row = tl.arange(0, HEADS)[:, None]
    if block < q_blocks:
        head = block * HEADS + row
        _norm_and_turn(
            q_ptr + token * q_stride + head * q_head_stride, q_out_ptr + (token * heads + head) * dim, q_out_ptr,
            q_weight_ptr, cos, sin, head < heads, dim, eps, HALF, IS_NEOX, PAIRS, DIM,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if block < q_blocks + k_blocks:
            head = (block - q_blocks) * HEADS + row
            _norm_and_turn(
                k_ptr + token * k_stride + head * k_head_stride, k_cache_ptr + slot * k_cache_stride + head * dim,
                k_cache_ptr, k_weight_ptr, cos, sin, head < kv_heads, dim, eps, HALF, IS_NEOX, PAIRS, DIM,
            )  # fmt: skip
        else:
            head = (block - q_blocks - k_blocks) * HEADS + row
            cols = tl.arange(0, VALUE)[None, :]
            mask = (head < kv_heads) & (cols < value_dim)
            value = tl.load(v_ptr + token * v_stride + head * v_head_stride + cols, mask=mask)
            to = v_cache_ptr + slot * v_cache_stride + head * value_dim + cols
            tl.store(to, to_cache(value, v_cache_ptr), mask=mask)
