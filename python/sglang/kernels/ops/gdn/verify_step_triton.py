"""Triton bodies of a verify step of gated delta nets: what the recurrence needs of every token, then the recurrence.

The tokens of a sequence are those that its tail holds, of which the first ``length`` count, and the step's own, REPEAT
of each.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.gdn.gates_triton import decay_of, unit_length


@triton.jit
def _num_counted(length_at, REPEAT: tl.constexpr):
    """Rows of the tail that count; never more than it has, whatever lies there."""
    return tl.minimum(tl.maximum(tl.load(length_at), 0), REPEAT).to(tl.int32)


@triton.jit
def _column(history_at, tail_at, x_at, s, length, tail_stride, x_stride, inside, WIDTH: tl.constexpr):
    """Channels of place ``s`` of a sequence: in the slot's columns below 0, then in its tail, then in the step."""
    dtype = x_at.dtype.element_ty
    old = tl.load(history_at + (WIDTH - 1 + s), mask=inside & (s < 0), other=0.0).to(dtype)
    tail = tl.load(tail_at + s * tail_stride, mask=inside & (s >= 0) & (s < length), other=0.0)
    new = tl.load(x_at + (s - length) * x_stride, mask=inside & (s >= length), other=0.0)
    return tl.where(s < 0, old, tl.where(s < length, tail, new))


@triton.jit
def verify_inputs_kernel(
    x_ptr, b_ptr, a_ptr, weight_ptr, A_log_ptr, dt_bias_ptr, columns_ptr, tail_ptr, tail_gates_ptr, length_ptr,
    slots_ptr, conv_ptr, gates_ptr,
    x_stride, b_stride, a_stride, columns_stride, channels, heads,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grid (channel blocks + 1, sequences) -> conv [B, 2 * REPEAT, C], and gates [B, 2 * REPEAT, 2, HV] float32.

    gates are decay and beta. A block owns its channels, and the last one the gates: it moves the slot's columns on by
    the tail's tokens that count, and puts the step's rows into the tail.
    """
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot == 0:  # padding
        return
    length = _num_counted(length_ptr + slot, REPEAT)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        head = tl.arange(0, BLOCK_H)
        there = head < heads
        A_log = tl.load(A_log_ptr + head, mask=there, other=0.0)
        dt_bias = tl.load(dt_bias_ptr + head, mask=there, other=0.0)
        for token in tl.static_range(2 * REPEAT):
            new_row = row * REPEAT + token % REPEAT
            tail_at = tail_gates_ptr + (slot * REPEAT + token % REPEAT) * 2 * heads + head
            if token < REPEAT:
                b = tl.load(tail_at, mask=there, other=0.0)
                a = tl.load(tail_at + heads, mask=there, other=0.0)
            else:
                b = tl.load(b_ptr + new_row * b_stride + head, mask=there, other=0.0)
                a = tl.load(a_ptr + new_row * a_stride + head, mask=there, other=0.0)
            gates_at = gates_ptr + (row * 2 * REPEAT + token) * 2 * heads + head
            tl.store(gates_at, tl.exp(decay_of(a, A_log, dt_bias)), mask=there)
            tl.store(gates_at + heads, 1.0 / (1.0 + tl.exp(-b.to(tl.float32))), mask=there)
            if token >= REPEAT:
                # Each thread has read what it overwrites: the old token of this place came before, at these addresses.
                tl.debug_barrier()
                tl.store(tail_at, b, mask=there)
                tl.store(tail_at + heads, a, mask=there)
        return
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    history_at = columns_ptr + slot * columns_stride + channel * (WIDTH - 1)
    tail_at = tail_ptr + slot * REPEAT * channels + channel
    x_at = x_ptr + row * REPEAT * x_stride + channel
    kept = columns_ptr.dtype.element_ty
    for token in tl.static_range(2 * REPEAT):
        place = length * (token // REPEAT) + token % REPEAT + tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(WIDTH):
            x = _column(
                history_at, tail_at, x_at, place - (WIDTH - 1) + tap, length, channels, x_stride,
                inside, WIDTH,
            )  # fmt: skip
            if tap < WIDTH - 1:
                x = x.to(kept).to(x_ptr.dtype.element_ty)
            weight = tl.load(weight_ptr + channel * WIDTH + tap, mask=inside, other=0.0)
            total += x.to(tl.float32) * weight.to(tl.float32)
        # A token of the tail that does not count would read the step's rows; nobody reads what it gives.
        conv_at = conv_ptr + (row * 2 * REPEAT + token) * channels + channel
        tl.store(conv_at, (total / (1.0 + tl.exp(-total))).to(conv_ptr.dtype.element_ty), mask=inside)
    taps = tl.arange(0, BLOCK_W)[None, :]
    s = length - (WIDTH - 1) + taps
    in_window = inside[:, None] & (taps < WIDTH - 1)
    window = tl.load(history_at[:, None] + (WIDTH - 1 + s), mask=in_window & (s < 0), other=0.0)
    from_tail = tl.load(tail_at[:, None] + s * channels, mask=in_window & (s >= 0), other=0.0)
    window = tl.where(s < 0, window, from_tail.to(kept))
    # All of the old columns and of the tail has been read by every thread before one of them overwrites it.
    tl.debug_barrier()
    tl.store(history_at[:, None] + taps, window, mask=in_window)
    for token in tl.static_range(REPEAT):
        new = tl.load(x_at + token * x_stride, mask=inside, other=0.0)
        tl.store(tail_at + token * channels, new, mask=inside)


@triton.jit
def _token(
    conv_at, gates_at, k_channel, v_channel, head, heads, in_key, in_value
):  # fmt: skip
    """Key at unit length [K], value [ROWS], decay and beta of one token."""
    k = unit_length(tl.load(conv_at + k_channel, mask=in_key, other=0.0), 0)
    v = tl.load(conv_at + v_channel, mask=in_value, other=0.0).to(tl.float32)
    return k, v, tl.load(gates_at + head), tl.load(gates_at + heads + head)


@triton.jit
def verify_scan_kernel(
    conv_ptr, gates_ptr, state_ptr, length_ptr, slots_ptr, out_ptr,
    state_stride, channels, key_heads, heads, per_key, scale,
    K: tl.constexpr, V: tl.constexpr, REPEAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (heads * parts of ROWS rows of a state, sequences) -> out [B * REPEAT, HV, V], before the norm.

    A part of a state is read once: it runs the tail's tokens that count, is stored, and goes on without being stored.
    """
    row = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(V, ROWS)
    head = tl.program_id(0) // parts
    lines, keys = (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    in_value, in_key = lines < V, keys < K
    slot = tl.load(slots_ptr + row).to(tl.int64)
    out_at = out_ptr + (row * REPEAT * heads + head) * V + lines
    dtype = out_ptr.dtype.element_ty
    if slot == 0:  # padding
        for token in tl.static_range(REPEAT):
            tl.store(out_at + token * heads * V, tl.zeros([ROWS], dtype), mask=in_value)
        return
    length = _num_counted(length_ptr + slot, REPEAT)
    q_channel = (head // per_key) * K + keys
    k_channel = q_channel + key_heads * K
    v_channel = 2 * key_heads * K + head * V + lines
    conv_at, gates_at = conv_ptr + row * 2 * REPEAT * channels, gates_ptr + row * 2 * REPEAT * 2 * heads
    state_at = state_ptr + slot * state_stride + (head.to(tl.int64) * V + lines)[:, None] * K + keys[None, :]
    mask = in_value[:, None] & in_key[None, :]
    kept = state_ptr.dtype.element_ty
    state = tl.load(state_at, mask=mask, other=0.0).to(tl.float32)
    for token in range(length):
        k, v, decay, beta = _token(
            conv_at + token * channels, gates_at + token * 2 * heads, k_channel, v_channel, head, heads, in_key,
            in_value,
        )  # fmt: skip
        delta = beta * (v - decay * tl.sum(state * k[None, :], axis=1))
        # Rounded as a slot between two steps.
        state = (state * decay + delta[:, None] * k[None, :]).to(kept).to(tl.float32)
    tl.store(state_at, state.to(kept), mask=mask)
    for token in range(REPEAT, 2 * REPEAT):
        here = conv_at + token * channels
        k, v, decay, beta = _token(
            here, gates_at + token * 2 * heads, k_channel, v_channel, head, heads, in_key, in_value
        )
        q = unit_length(tl.load(here + q_channel, mask=in_key, other=0.0), 0)
        delta = beta * (v - decay * tl.sum(state * k[None, :], axis=1))
        answered = decay * tl.sum(state * q[None, :], axis=1) + delta * tl.sum(q * k, axis=0)
        tl.store(out_at + (token - REPEAT) * heads * V, (answered * scale).to(dtype), mask=in_value)
        state = (state * decay + delta[:, None] * k[None, :]).to(kept).to(tl.float32)
