"""Triton body that pools tokens to entries, norms, turns and stores them, and keeps this step's rows as states."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.packed_rows_triton import store_row
from sglang.kernels.ops.rope.rotary_tail_triton import turn_tail


@triton.jit
def _products(rows_ptr, states_ptr, sources, column, row_stride, state_stride, inside):
    """[T, BLOCK] float32 of the step's rows or of the states, 0 where a source is -1."""
    row, state = tl.maximum(sources, 0)[:, None], tl.maximum(-2 - sources, 0)[:, None]
    of_step = tl.load(rows_ptr + row * row_stride + column, mask=(sources >= 0)[:, None] & inside, other=0.0)
    of_state = tl.load(states_ptr + state * state_stride + column, mask=(sources < -1)[:, None] & inside, other=0.0)
    return of_step.to(tl.float32) + of_state


@triton.jit
def _pool(
    entry, kv_ptr, gate_ptr, kv_states_ptr, gate_states_ptr, sources_ptr, bias_ptr,
    kv_stride, gate_stride, kv_state_stride, gate_state_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sum [BLOCK] of an entry's tokens, weighted by a softmax per channel; 0 for an entry of no tokens."""
    channel = tl.arange(0, BLOCK)[None, :]
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    # The last token closes an entry, so one without it has none.
    closed = tl.load(sources_ptr + entry * TOKENS + TOKENS - 1) != -1
    for first in range(0, tl.where(closed, TOKENS, 0), STEP):
        token = first + tl.arange(0, STEP)
        sources = tl.load(sources_ptr + entry * TOKENS + token, mask=token < TOKENS, other=-1)
        # The first RATIO tokens give their first columns, the next ones their next.
        column = (token // RATIO * DIM)[:, None] + channel
        inside = (token < TOKENS)[:, None] & (channel < DIM)
        values = _products(kv_ptr, kv_states_ptr, sources, column, kv_stride, kv_state_stride, inside)
        gates = _products(gate_ptr, gate_states_ptr, sources, column, gate_stride, gate_state_stride, inside)
        bias_at = bias_ptr + (token % RATIO)[:, None] * (TOKENS // RATIO * DIM) + column
        gates += tl.load(bias_at, mask=inside, other=0.0)
        gates = tl.where((sources != -1)[:, None], gates, float("-inf"))
        highest = tl.maximum(maximum, tl.max(gates, 0))
        pivot = tl.where(highest == float("-inf"), 0.0, highest)
        keep = tl.exp(maximum - pivot)
        weights = tl.exp(gates - pivot[None, :])
        total = total * keep + tl.sum(weights, 0)
        acc = acc * keep + tl.sum(weights * values, 0)
        maximum = highest
    return acc / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _norm(row, weight_ptr, eps, DIM: tl.constexpr):
    """RMS norm of a row [BLOCK] of DIM columns."""
    column = tl.arange(0, row.shape[0])
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    row = tl.where(column < DIM, row, 0.0)
    return weight * (row * tl.rsqrt(tl.sum(row * row, 0) / DIM + eps))


@triton.jit
def _keep(from_ptr, to_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a row to float32."""
    column = tl.arange(0, BLOCK)
    tl.store(to_ptr + column, tl.load(from_ptr + column, mask=column < WIDTH).to(tl.float32), mask=column < WIDTH)


@triton.jit(do_not_specialize=["first", "num_entries"])
def compress_kernel(
    kv_ptr, gate_ptr, kv_states_ptr, gate_states_ptr, state_rows_ptr, sources_ptr, bias_ptr, norm_ptr, table_ptr,
    positions_ptr, entry_rows_ptr, cache_ptr, scales_ptr,
    eps, first, num_entries, kv_stride, gate_stride, kv_state_stride, gate_state_stride, table_stride,
    page_stride, scale_page_stride,
    KIND: tl.constexpr, PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, NUM_SCALES: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, RATIO: tl.constexpr, ROTARY: tl.constexpr, STEP: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """grid (programs from ``first`` on): an entry each, then a row of the step each, which becomes a state."""
    program = (tl.program_id(0) + first).to(tl.int64)
    if program < num_entries:
        pooled = _pool(
            program, kv_ptr, gate_ptr, kv_states_ptr, gate_states_ptr, sources_ptr, bias_ptr,
            kv_stride, gate_stride, kv_state_stride, gate_state_stride, DIM, BLOCK, TOKENS, RATIO, STEP,
        )  # fmt: skip
        at = table_ptr + tl.load(positions_ptr + program) * table_stride
        turned = turn_tail(_norm(pooled, norm_ptr, eps, DIM)[None, :], at, DIM, ROTARY, False)
        store_row(
            tl.reshape(turned, [BLOCK]), tl.load(entry_rows_ptr + program), cache_ptr, scales_ptr,
            page_stride, scale_page_stride, KIND, PER_PAGE, WIDTH, NUM_SCALES, DIM,
        )  # fmt: skip
    else:
        row = program - num_entries
        state = tl.load(state_rows_ptr + row)
        width: tl.constexpr = TOKENS // RATIO * DIM
        _keep(kv_ptr + row * kv_stride, kv_states_ptr + state * kv_state_stride, width, BLOCK_W)
        _keep(gate_ptr + row * gate_stride, gate_states_ptr + state * gate_state_stride, width, BLOCK_W)
