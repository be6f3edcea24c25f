"""Triton bodies of sparse attention in two passes, for many queries: logits of blocks of rows, then sums of values.

Neither keeps a query's 512 columns of sums in registers, and no two programs of one pass make the same numbers of a
row's bytes. Between them lie, by row of a query, its weight for each head under the largest of its block, and where the
row is with its scales.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.decode_triton import LOG2E
from sglang.kernels.ops.attention.packed_rows_triton import GROUP, exponent_to_scale

# Bytes that a place in a cache counts.
UNIT = tl.constexpr(16)

# Four bytes e4m3 and their scale, twice, as bfloat16 -> four bfloat16. The bits of a byte behind the sign are the last
# of the exponent and the first of the fraction: the number times 2^-120.
SM90_NUMBERS = tl.constexpr("""{
    .reg .b32 low, high, sign, most;
    mov.b32 most, 0x7B807B80;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    shr.u32 low, low, 4;
    lop3.b32 low, low, 0x07F007F0, sign, 0xEA;
    mul.bf16x2 low, low, most;
    mul.bf16x2 $0, low, $3;
    and.b32 sign, high, 0x80008000;
    shr.u32 high, high, 4;
    lop3.b32 high, high, 0x07F007F0, sign, 0xEA;
    mul.bf16x2 high, high, most;
    mul.bf16x2 $1, high, $4;
}""")


@triton.jit
def _numbers(bits, exponents, dtype, DTYPE: tl.constexpr, SM90: tl.constexpr):
    """Bytes [N, C] of 8-bit floats DTYPE, exponents [N, 1] or [N, C] int32 -> ``dtype``, with SM90 bfloat16."""
    if SM90:
        # Exponent 0 is zero, as in ``exponent_to_scale``.
        scale = (exponents << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
        scale = tl.broadcast_to(scale, bits.shape)
        return tl.inline_asm_elementwise(
            SM90_NUMBERS, "=r,=r,r,r,r", [bits, scale], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return (bits.to(DTYPE, bitcast=True).to(tl.float32) * exponent_to_scale(exponents)).to(dtype)


@triton.jit(do_not_specialize=["num_window", "num_chosen"])
def block_logits_kernel(
    q_ptr, window_ptr, window_scales_ptr, window_rows_ptr,
    entries_ptr, entry_scales_ptr, chosen_ptr, table_ptr, requests_ptr, visible_ptr,
    weights_ptr, places_ptr, scales_out_ptr, most_ptr, total_ptr,
    scale, num_heads, num_window, num_chosen,
    q_stride, q_head_stride, window_stride, window_scale_stride, window_rows_stride,
    entry_stride, entry_scale_stride, chosen_stride, table_stride,
    PLAIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, ENTRY_PAGE: tl.constexpr, CHOSEN: tl.constexpr,
    DTYPE: tl.constexpr, SM90: tl.constexpr,
):  # fmt: skip
    """grid (queries * head blocks, blocks of rows): a block of the window or of the entries.

    Of slots = blocks * BLOCK_N places of a query: weights [Q, H, slots] float16 with the largest of a block 1, places
    [Q, slots] int64 in UNIT bytes of its cache (-1: none), scales [Q, slots] int64, eight bytes. most and total
    [Q, blocks, H] float32: the largest logit, as a power of two, and the sum of weights.
    """
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    block = tl.program_id(1)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < num_heads
    lane = tl.arange(0, BLOCK_N)
    window_blocks = tl.cdiv(num_window, BLOCK_N)
    in_window = block < window_blocks
    if in_window:
        place = block * BLOCK_N + lane
        ids = tl.load(window_rows_ptr + row * window_rows_stride + place, mask=place < num_window, other=-1)
        there = (ids >= 0).to(tl.int32)
        ids = ids.to(tl.int64)
        units = ids // WINDOW_PAGE * (window_stride // UNIT) + ids % WINDOW_PAGE * (WIDTH // UNIT)
        scale_units = ids // WINDOW_PAGE * (window_scale_stride // 8) + ids % WINDOW_PAGE
    else:
        entry = (block - window_blocks) * BLOCK_N + lane
        seen = tl.load(visible_ptr + row).to(tl.int32)
        if CHOSEN:
            seen = tl.minimum(seen, num_chosen)
        there = (entry < seen).to(tl.int32)
        if CHOSEN:
            entry = tl.load(chosen_ptr + row * chosen_stride + entry, mask=there != 0, other=-1)
            there = (entry >= 0).to(tl.int32)
        table = table_ptr + tl.load(requests_ptr + row) * table_stride
        page = tl.load(table + entry // ENTRY_PAGE, mask=there != 0, other=0).to(tl.int64)
        units = page * (entry_stride // UNIT) + entry % ENTRY_PAGE * (WIDTH // UNIT)
        scale_units = page * (entry_scale_stride // 8) + entry % ENTRY_PAGE
    here = there != 0
    rows = tl.where(in_window, window_ptr, entries_ptr).to(tl.pointer_type(tl.uint8))
    scales = tl.where(in_window, window_scales_ptr, entry_scales_ptr).to(tl.pointer_type(tl.int64))
    exponents = tl.load(scales + scale_units, mask=here, other=0)
    slots = tl.num_programs(1) * BLOCK_N
    slot = row * slots + block * BLOCK_N + lane
    tl.store(places_ptr + slot, tl.where(here, units, -1))
    tl.store(scales_out_ptr + slot, exponents)
    at = rows + units * UNIT
    column = tl.arange(0, GROUP)
    q_at = q_ptr + row * q_stride + head[:, None] * q_head_stride + column[None, :]
    tail = tl.load(
        (at + PLAIN).to(tl.pointer_type(tl.bfloat16))[:, None] + column[None, :], mask=here[:, None], other=0.0
    )
    q = tl.load(q_at + PLAIN, mask=live[:, None], other=0.0)
    logits = tl.dot(q, tl.trans(tail.to(q.dtype)), input_precision="ieee")
    for first in range(0, PLAIN, GROUP):
        q = tl.load(q_at + first, mask=live[:, None], other=0.0)
        bits = tl.load(at[:, None] + (first + column)[None, :], mask=here[:, None], other=0)
        exponent = ((exponents >> (first // 8)) & 255).to(tl.int32)
        k = _numbers(bits, exponent[:, None], q.dtype, DTYPE, SM90)
        logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
    logits = tl.where(here[None, :], logits * (scale * LOG2E), float("-inf"))
    most = tl.max(logits, 1)
    weights = tl.exp2(logits - tl.where(most == float("-inf"), 0.0, most)[:, None])
    stat = (row * tl.num_programs(1) + block) * num_heads + head
    tl.store(most_ptr + stat, most, mask=live)
    tl.store(total_ptr + stat, tl.sum(weights, 1), mask=live)
    weights_at = weights_ptr + (row * num_heads + head)[:, None] * slots + (block * BLOCK_N + lane)[None, :]
    tl.store(weights_at, weights.to(tl.float16), mask=live[:, None])


@triton.jit
def _sum_values(
    rows, entry_rows, weights_at, places_at, scales_at, most_at, live, pivot, window_slots, slots, num_heads,
    part, dtype,
    PLAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, HAS_TAIL: tl.constexpr,
    DTYPE: tl.constexpr, SM90: tl.constexpr,
):  # fmt: skip
    """Columns ``part`` of BLOCK_C each, [H, BLOCK_C] float32; HAS_TAIL: the last of them are bfloat16."""
    column = tl.arange(0, GROUP)
    group = part * (BLOCK_C // GROUP) + tl.arange(0, BLOCK_C // GROUP)
    acc = tl.zeros([live.shape[0], BLOCK_C], tl.float32)
    for first in range(0, slots, ROWS):
        units = tl.load(places_at + first)
        here = units >= 0
        at = tl.where(first < window_slots, rows, entry_rows) + units * UNIT
        weights = tl.load(weights_at + first, mask=live[:, None], other=0.0)
        most = tl.load(most_at + first // BLOCK_N * num_heads, mask=live, other=float("-inf"))
        columns = (group[:, None] * GROUP + column[None, :])[None, :, :]
        exponents = tl.load(scales_at + first)
        exponent = ((exponents[:, None] >> (group * 8)[None, :]) & 255).to(tl.int32)
        if HAS_TAIL:
            is_plain = columns < PLAIN
            bits = tl.load(at[:, None, None] + columns, mask=here[:, None, None] & is_plain, other=0)
            tail_at = (at + PLAIN).to(tl.pointer_type(tl.bfloat16))
            tail = tl.load(tail_at[:, None] + column[None, :], mask=here[:, None], other=0.0)
            v = _numbers(bits, exponent[:, :, None], dtype, DTYPE, SM90)
            v = tl.where(is_plain, v, tail.to(dtype)[:, None, :])
        else:
            bits = tl.load(at[:, None, None] + columns, mask=here[:, None, None], other=0)
            v = _numbers(bits, exponent[:, :, None], dtype, DTYPE, SM90)
        weights = (weights.to(tl.float32) * tl.exp2(most - pivot)[:, None]).to(dtype)
        acc = tl.dot(weights, tl.reshape(v, [ROWS, BLOCK_C]), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_window", "blocks"])
def block_values_kernel(
    window_ptr, entries_ptr, sinks_ptr, weights_ptr, places_ptr, scales_ptr, most_ptr, total_ptr, out_ptr,
    num_heads, num_window, blocks,
    DIM: tl.constexpr, PLAIN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr, SM90: tl.constexpr,
):  # fmt: skip
    """grid (queries * head blocks * DIM / BLOCK_C): sums over all blocks, ROWS at once, of BLOCK_C columns."""
    parts: tl.constexpr = DIM // BLOCK_C
    part = tl.program_id(0) % parts
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    row = (tl.program_id(0) // parts // head_blocks).to(tl.int64)
    head = tl.program_id(0) // parts % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < num_heads
    every = tl.arange(0, BLOCKS)
    stat = (row * blocks + every)[None, :] * num_heads + head[:, None]
    known = live[:, None] & (every < blocks)[None, :]
    most = tl.load(most_ptr + stat, mask=known, other=float("-inf"))
    sink = tl.load(sinks_ptr + head, mask=live, other=float("-inf")) * LOG2E
    pivot = tl.maximum(tl.max(most, 1), sink)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    shares = tl.load(total_ptr + stat, mask=known, other=0.0) * tl.exp2(most - pivot[:, None])
    total = tl.sum(shares, 1) + tl.exp2(sink - pivot)
    dtype = out_ptr.dtype.element_ty
    lane = tl.arange(0, ROWS)
    slots = blocks * BLOCK_N
    window_slots = tl.cdiv(num_window, BLOCK_N) * BLOCK_N
    rows, entry_rows = window_ptr.to(tl.pointer_type(tl.uint8)), entries_ptr.to(tl.pointer_type(tl.uint8))
    weights_at = weights_ptr + (row * num_heads + head)[:, None] * slots + lane[None, :]
    places_at, scales_at = places_ptr + row * slots + lane, scales_ptr + row * slots + lane
    most_at = most_ptr + row * blocks * num_heads + head
    if (part + 1) * BLOCK_C > PLAIN:
        acc = _sum_values(
            rows, entry_rows, weights_at, places_at, scales_at, most_at, live, pivot, window_slots, slots, num_heads,
            part, dtype, PLAIN, BLOCK_N, BLOCK_C, ROWS, True, DTYPE, SM90,
        )  # fmt: skip
    else:
        acc = _sum_values(
            rows, entry_rows, weights_at, places_at, scales_at, most_at, live, pivot, window_slots, slots, num_heads,
            part, dtype, PLAIN, BLOCK_N, BLOCK_C, ROWS, False, DTYPE, SM90,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_at = (row * num_heads + head)[:, None] * DIM + (part * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
