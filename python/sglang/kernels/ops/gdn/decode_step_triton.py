"""Triton body of one decode step of a gated delta net: one launch, everything a key head owns in one program."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.gdn.gates_triton import decay_of, unit_length


@triton.jit
def conv_token(x_at, weight_at, columns_at, inside, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """One token of the convolution for a vector of channels: its output in x's dtype, and the window [D, BLOCK_W].

    The pointers name each channel's input, its taps and its columns; the window's last WIDTH - 1 columns are the next
    token's history, stored by ``keep_window`` once every thread has read the old one.
    """
    taps = tl.arange(0, BLOCK_W)[None, :]
    x = tl.load(x_at, mask=inside, other=0.0)
    old = tl.load(columns_at[:, None] + taps, mask=inside[:, None] & (taps < WIDTH - 1), other=0.0)
    window = tl.where(taps == WIDTH - 1, x[:, None], old.to(x.dtype))
    weight = tl.load(weight_at[:, None] + taps, mask=inside[:, None] & (taps < WIDTH), other=0.0)
    total = tl.sum(window.to(tl.float32) * weight.to(tl.float32), axis=1)
    return (total / (1.0 + tl.exp(-total))).to(x.dtype), window


@triton.jit
def keep_window(columns_at, window, inside, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Store the history of the next token."""
    taps = tl.arange(0, BLOCK_W)[None, :]
    mask = inside[:, None] & (taps >= 1) & (taps < WIDTH)
    tl.store(columns_at[:, None] + taps - 1, window.to(columns_at.dtype.element_ty), mask=mask)


@triton.jit
def decode_step_kernel(
    x_ptr, z_ptr, b_ptr, a_ptr, conv_weight_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr,
    columns_ptr, state_ptr, slots_ptr, out_ptr,
    x_stride, z_stride, b_stride, a_stride, columns_stride, state_stride,
    key_heads, scale, eps,
    K: tl.constexpr, V: tl.constexpr, PER_KEY: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid (key heads, rows). A program owns its key head's channels and states, so it may overwrite what it reads.

    The states of its PER_KEY value heads (BLOCK_H, a power of two, with room) pass through in tiles of ROWS rows.
    """
    wait_for_kernel_ahead()
    key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads, keys, lane = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_key, in_values = keys < K, (heads < PER_KEY)[:, None] & (lane < V)[None, :]
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first_head = key_head * PER_KEY
    value_tile = heads[:, None] * V + lane[None, :]
    out_at = out_ptr + (row * key_heads * PER_KEY + first_head) * V + value_tile
    dtype = out_ptr.dtype.element_ty
    if slot == 0:  # padding
        tl.store(out_at, tl.zeros([BLOCK_H, BLOCK_V], dtype), mask=in_values)
        return

    x_at, columns_at = x_ptr + row * x_stride, columns_ptr + slot * columns_stride
    q_channels = key_head * K + keys
    k_channels = q_channels + key_heads * K
    flat = tl.arange(0, BLOCK_H * BLOCK_V)
    in_flat = (flat // BLOCK_V < PER_KEY) & (flat % BLOCK_V < V)
    v_channels = 2 * key_heads * K + first_head * V + (flat // BLOCK_V) * V + flat % BLOCK_V
    q_columns_at = columns_at + q_channels * (WIDTH - 1)
    k_columns_at = columns_at + k_channels * (WIDTH - 1)
    v_columns_at = columns_at + v_channels * (WIDTH - 1)
    weight_at = conv_weight_ptr
    q, q_window = conv_token(x_at + q_channels, weight_at + q_channels * WIDTH, q_columns_at, in_key, WIDTH, BLOCK_W)
    k, k_window = conv_token(x_at + k_channels, weight_at + k_channels * WIDTH, k_columns_at, in_key, WIDTH, BLOCK_W)
    v, v_window = conv_token(x_at + v_channels, weight_at + v_channels * WIDTH, v_columns_at, in_flat, WIDTH, BLOCK_W)
    q, k = unit_length(q, 0), unit_length(k, 0)
    overlap = tl.sum(q * k, axis=0)
    # A short vector is read by several threads, each of which must have read it before one of them overwrites it.
    tl.debug_barrier()
    keep_window(q_columns_at, q_window, in_key, WIDTH, BLOCK_W)
    keep_window(k_columns_at, k_window, in_key, WIDTH, BLOCK_W)
    keep_window(v_columns_at, v_window, in_flat, WIDTH, BLOCK_W)

    PARTS: tl.constexpr = BLOCK_V // ROWS  # tiles of a head
    tiles, part = tl.arange(0, BLOCK_H * PARTS), tl.arange(0, ROWS)
    v = tl.reshape(v, [BLOCK_H * PARTS, ROWS]).to(tl.float32)
    tile_head, live = first_head + tiles // PARTS, tiles // PARTS < PER_KEY
    a = tl.load(a_ptr + row * a_stride + tile_head, mask=live, other=0.0)
    b = tl.load(b_ptr + row * b_stride + tile_head, mask=live, other=0.0).to(tl.float32)
    A_log = tl.load(A_log_ptr + tile_head, mask=live, other=0.0)
    decays = tl.exp(decay_of(a, A_log, tl.load(dt_bias_ptr + tile_head, mask=live, other=0.0)))
    betas = 1.0 / (1.0 + tl.exp(-b))
    state_base = state_ptr + slot * state_stride + first_head.to(tl.int64) * V * K
    outs = tl.zeros([BLOCK_H * PARTS, ROWS], tl.float32)
    for tile in tl.range(0, PER_KEY * PARTS, num_stages=STAGES):
        lines = (tile % PARTS) * ROWS + part
        state_at = state_base + ((tile // PARTS) * V + lines)[:, None] * K + keys[None, :]
        mask = (lines < V)[:, None] & in_key[None, :]
        state = tl.load(state_at, mask=mask, other=0.0).to(tl.float32)
        this = tiles == tile
        decay = tl.sum(tl.where(this, decays, 0.0), axis=0)
        beta = tl.sum(tl.where(this, betas, 0.0), axis=0)
        value = tl.sum(tl.where(this[:, None], v, 0.0), axis=0)
        # The old state answers both k and q; what is written then corrects the answer to q.
        seen = tl.sum(state * k[None, :], axis=1)
        answered = tl.sum(state * q[None, :], axis=1)
        delta = beta * (value - decay * seen)
        state = state * decay + delta[:, None] * k[None, :]
        tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=mask)
        outs = tl.where(this[:, None], ((decay * answered + delta * overlap) * scale)[None, :], outs)

    # Rounded where the reference rounds: before the norm, after it and after its weight.
    out = tl.reshape(outs, [BLOCK_H, BLOCK_V]).to(dtype).to(tl.float32)
    rms = tl.rsqrt(tl.sum(out * out, axis=1, keep_dims=True) / V + eps)
    weight = tl.load(norm_weight_ptr + lane, mask=lane < V, other=0.0).to(tl.float32)
    normed = ((out * rms).to(dtype).to(tl.float32) * weight[None, :]).to(dtype).to(tl.float32)
    z_at = z_ptr + row * z_stride + first_head * V + value_tile
    z = tl.load(z_at, mask=in_values, other=0.0).to(tl.float32)
    tl.store(out_at, (normed * (z / (1.0 + tl.exp(-z)))).to(dtype), mask=in_values)
