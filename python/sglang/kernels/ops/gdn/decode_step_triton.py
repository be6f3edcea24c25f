"""Triton body of one decode step of a gated delta net: one launch, everything a key head owns in one program."""

import triton
import triton.language as tl

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
    K: tl.constexpr, V: tl.constexpr, PER_KEY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """grid (key heads, rows). A program owns its key head's channels and states, so it may overwrite what it reads."""
    key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_key, in_value = keys < K, values < V
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first_head = key_head * PER_KEY
    out_at = out_ptr + (row * key_heads * PER_KEY + first_head) * V + values
    dtype = out_ptr.dtype.element_ty
    if slot == 0:  # padding
        for i in tl.static_range(PER_KEY):
            tl.store(out_at + i * V, tl.zeros([BLOCK_V], dtype), mask=in_value)
        return
    tile = values[:, None] * K + keys[None, :]
    in_tile = in_value[:, None] & in_key[None, :]
    state_at = state_ptr + slot * state_stride + first_head.to(tl.int64) * V * K + tile
    # On its way while the convolution runs.
    state = tl.load(state_at, mask=in_tile, other=0.0).to(tl.float32)

    x_at, columns_at = x_ptr + row * x_stride, columns_ptr + slot * columns_stride
    q_channels = key_head * K + keys
    k_channels = q_channels + key_heads * K
    q_columns_at = columns_at + q_channels * (WIDTH - 1)
    k_columns_at = columns_at + k_channels * (WIDTH - 1)
    q, q_window = conv_token(
        x_at + q_channels, conv_weight_ptr + q_channels * WIDTH, q_columns_at, in_key, WIDTH, BLOCK_W
    )
    k, k_window = conv_token(
        x_at + k_channels, conv_weight_ptr + k_channels * WIDTH, k_columns_at, in_key, WIDTH, BLOCK_W
    )
    q, k = unit_length(q, 0), unit_length(k, 0)
    overlap = tl.sum(q * k, axis=0)
    # A short vector is read by several threads, each of which must have read it before one of them overwrites it.
    tl.debug_barrier()
    keep_window(q_columns_at, q_window, in_key, WIDTH, BLOCK_W)
    keep_window(k_columns_at, k_window, in_key, WIDTH, BLOCK_W)
    norm_weight = tl.load(norm_weight_ptr + values, mask=in_value, other=0.0).to(tl.float32)

    for i in tl.static_range(PER_KEY):
        head = first_head + i
        if i > 0:
            state = tl.load(state_at + i * V * K, mask=in_tile, other=0.0).to(tl.float32)
        v_channels = 2 * key_heads * K + head * V + values
        v_columns_at = columns_at + v_channels * (WIDTH - 1)
        v, v_window = conv_token(
            x_at + v_channels, conv_weight_ptr + v_channels * WIDTH, v_columns_at, in_value, WIDTH, BLOCK_W
        )
        log_decay = decay_of(
            tl.load(a_ptr + row * a_stride + head), tl.load(A_log_ptr + head), tl.load(dt_bias_ptr + head)
        )
        decay = tl.exp(log_decay)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + row * b_stride + head).to(tl.float32)))
        # The old state answers both k and q; what is written then corrects the answer to q.
        seen = tl.sum(state * k[None, :], axis=1)
        answered = tl.sum(state * q[None, :], axis=1)
        delta = beta * (v.to(tl.float32) - decay * seen)
        out = ((decay * answered + delta * overlap) * scale).to(dtype).to(tl.float32)
        state = state * decay + delta[:, None] * k[None, :]
        tl.debug_barrier()
        tl.store(state_at + i * V * K, state.to(state_ptr.dtype.element_ty), mask=in_tile)
        keep_window(v_columns_at, v_window, in_value, WIDTH, BLOCK_W)
        rms = tl.rsqrt(tl.sum(tl.where(in_value, out * out, 0.0), axis=0) / V + eps)
        z = tl.load(z_ptr + row * z_stride + head * V + values, mask=in_value, other=0.0).to(tl.float32)
        # Rounded where the reference rounds: after the norm and after its weight.
        normed = ((out * rms).to(dtype).to(tl.float32) * norm_weight).to(dtype).to(tl.float32)
        tl.store(out_at + i * V, (normed * (z / (1.0 + tl.exp(-z)))).to(dtype), mask=in_value)
