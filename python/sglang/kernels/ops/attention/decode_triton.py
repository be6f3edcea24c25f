"""Triton bodies of attention of few queries per request over the request table: a pass over spans, and their merge.

Both passes exist for keys with a value cache of their own and for latent rows, whose first columns are the value
(``VALUE_IS_KEY``). A key row has MAIN columns (a power of two of them loaded, ``KEY``) and then TAIL further ones.
A request brings REPEAT queries, those of its last tokens, which read a span of its context once for all of them: with
several, a head stands for one of each, and sees the tokens up to its own.
"""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.activation.sigmoid_mul_triton import gated
from sglang.kernels.ops.quant.scales_triton import store_quantized

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _span(seq_len, split, splits, BLOCK_N: tl.constexpr):
    """Tokens [start, end) of one split; whole blocks, so that only a context's last block is ragged."""
    length = tl.cdiv(tl.cdiv(seq_len, splits), BLOCK_N) * BLOCK_N
    start = split * length
    return start, tl.minimum(start + length, seq_len)


@triton.jit
def load_columns(at, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns [0, WIDTH) of the rows that ``at`` points into, as DTYPE; ``mask`` selects them among BLOCK."""
    if WIDTH == BLOCK:
        return tl.load(at).to(DTYPE)
    return tl.load(at, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _add_logits(logits, k, q, HEAD_AXIS: tl.constexpr):
    """Products of keys k [tokens, C] with q, added to ``logits`` if there are any.

    q [heads, C] -> [heads, tokens], or with HEAD_AXIS 1 q [C, heads] -> [tokens, heads].
    """
    if HEAD_AXIS == 0:
        return tl.dot(q, tl.trans(k), logits, input_precision="ieee")
    else:
        return tl.dot(k, q, logits, input_precision="ieee")


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lens_ptr, out_ptr, lse_ptr,
    scale, num_heads, group, splits,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, table_stride,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, VALUE_IS_KEY: tl.constexpr,
    KEY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, REPEAT: tl.constexpr, HEAD_AXIS: tl.constexpr,
    gate_ptr=None, gate_stride=0, gate_head_stride=0,
):  # fmt: skip
    """grid (key heads * head blocks, requests, splits), so that those who read the same rows run together -> out
    [B * REPEAT, splits, H, V] and lse [B * REPEAT, splits, H] float32, or with WHOLE (one split) out [B * REPEAT, H, V]
    in its own dtype, gated if there is a gate [B * REPEAT, H, V] of that dtype.

    HEAD_AXIS 0, for many heads over one key head: heads are the rows of both products. HEAD_AXIS 1, for few: tokens
    are the rows, so that HEADS may be as small as 16 on a wide matrix unit.
    """
    wait_for_kernel_ahead()
    # Logits and sums are [heads, tokens or columns], or the reverse.
    OTHER_AXIS: tl.constexpr = 1 - HEAD_AXIS
    request = tl.program_id(1)
    head_blocks = tl.cdiv(group * REPEAT, HEADS)
    kv_head = tl.program_id(0) // head_blocks
    in_group = (tl.program_id(0) % head_blocks) * HEADS + tl.arange(0, HEADS)
    live = in_group < group * REPEAT
    query = request.to(tl.int64)
    heads = kv_head * group + in_group
    if REPEAT > 1:
        query = query * REPEAT + in_group // group
        heads = kv_head * group + in_group % group
    split = tl.program_id(2)
    seq_len = tl.load(lens_ptr + request).to(tl.int32)
    start, end = _span(seq_len, split, splits, BLOCK_N)
    values = tl.arange(0, BLOCK_V)
    out_row = (query * splits + split) * num_heads + heads
    out_at = out_ptr + tl.expand_dims(out_row, OTHER_AXIS) * VALUE + tl.expand_dims(values, HEAD_AXIS)
    out_mask = tl.expand_dims(live, OTHER_AXIS) & tl.expand_dims(values < VALUE, HEAD_AXIS)
    if gate_ptr is not None:
        gate_row = gate_ptr + query * gate_stride + heads * gate_head_stride
        gate_at = tl.expand_dims(gate_row, OTHER_AXIS) + tl.expand_dims(values, HEAD_AXIS)
    if start >= end:
        if WHOLE:
            nothing = tl.zeros(out_mask.shape, out_ptr.dtype.element_ty)
            if gate_ptr is not None:
                nothing = gated(nothing, tl.load(gate_at, mask=out_mask, other=0.0))
            tl.store(out_at, nothing, mask=out_mask)
        else:
            tl.store(lse_ptr + out_row, tl.full([HEADS], float("-inf"), tl.float32), mask=live)
        return
    keys = tl.arange(0, KEY)
    q_at = q_ptr + heads[:, None] * q_head_stride
    if REPEAT > 1:
        q_at += query[:, None] * q_stride
    else:
        q_at += query * q_stride
    q = tl.load(q_at + keys[None, :], mask=live[:, None] & (keys < MAIN)[None, :], other=0.0)
    if HEAD_AXIS == 1:
        q = tl.trans(q)
    k_base = k_ptr + kv_head * k_head_stride
    v_base = v_ptr + kv_head * v_head_stride
    if TAIL > 0:
        tails = tl.arange(0, BLOCK_T)
        q_tail = tl.load(q_at + MAIN + tails[None, :], mask=live[:, None] & (tails < TAIL)[None, :], other=0.0)
        if HEAD_AXIS == 1:
            q_tail = tl.trans(q_tail)
    table = table_ptr + tl.load(rows_ptr + request) * table_stride
    # The first token that a query does not see, and the first that only some of them see.
    ends, own = end + in_group * 0, seq_len - REPEAT + 1
    if REPEAT > 1:
        ends = tl.minimum(ends, own + in_group // group)
    scale2 = scale * LOG2E
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros(out_mask.shape, tl.float32)
    for first in range(start, end, BLOCK_N):
        # Past the end the last token is read again: another slot may hold NaN, which a zero probability keeps.
        tokens = first + tl.arange(0, BLOCK_N)
        slots = tl.load(table + tl.minimum(tokens, end - 1)).to(tl.int64)[:, None]
        k = load_columns(k_base + slots * k_stride + keys[None, :], (keys < MAIN)[None, :], MAIN, KEY, q.dtype)
        logits = _add_logits(None, k, q, HEAD_AXIS)
        if TAIL > 0:
            tail_at = k_base + slots * k_stride + MAIN + tails[None, :]
            k_tail = load_columns(tail_at, (tails < TAIL)[None, :], TAIL, BLOCK_T, q.dtype)
            logits = _add_logits(logits, k_tail, q_tail, HEAD_AXIS)
        if REPEAT > 1:
            v = k
            if not VALUE_IS_KEY:
                v_at = v_base + slots * v_stride + values[None, :]
                v = load_columns(v_at, (values < VALUE)[None, :], VALUE, BLOCK_V, q.dtype)
            if first + BLOCK_N > own:
                # A value that is not finite makes those who see it NaN, and nobody else.
                finite = tl.abs(v) < float("inf")
                broken = tl.min(finite.to(tl.int32), axis=1) == 0
                logits = tl.where(tl.expand_dims(broken, HEAD_AXIS), float("nan"), logits)
                v = tl.where(finite, v, 0.0)
            seen = tl.expand_dims(tokens, HEAD_AXIS) < tl.expand_dims(ends, OTHER_AXIS)
            logits = tl.where(seen, logits, float("-inf"))
            highest = tl.maximum(maximum, tl.max(logits, OTHER_AXIS))
            # A query may see nothing of a span; zero in place of its maximum keeps its weights zero instead of NaN.
            pivot = tl.where(highest == float("-inf"), 0.0, highest)
        else:
            logits = tl.where(tl.expand_dims(tokens < end, HEAD_AXIS), logits, float("-inf"))
            highest = tl.maximum(maximum, tl.max(logits, OTHER_AXIS))
            pivot = highest
        keep = tl.exp2((maximum - pivot) * scale2)
        probs = tl.exp2(logits * scale2 - tl.expand_dims(pivot * scale2, OTHER_AXIS))
        total = total * keep + tl.sum(probs, OTHER_AXIS)
        maximum = highest
        acc = acc * tl.expand_dims(keep, OTHER_AXIS)
        if REPEAT == 1:
            v = k
            if not VALUE_IS_KEY:
                v_at = v_base + slots * v_stride + values[None, :]
                v = load_columns(v_at, (values < VALUE)[None, :], VALUE, BLOCK_V, q.dtype)
        if HEAD_AXIS == 0:
            acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
        else:
            acc = tl.dot(tl.trans(v), probs.to(v.dtype), acc, input_precision="ieee")
    # Where several queries share a span, one may have seen nothing: 1 there, and the part does not count by its lse.
    shares = total if REPEAT == 1 else tl.where(total == 0.0, 1.0, total)
    acc = acc / tl.expand_dims(shares, OTHER_AXIS)
    out = acc.to(out_ptr.dtype.element_ty)
    if gate_ptr is not None:
        out = gated(out, tl.load(gate_at, mask=out_mask, other=0.0))
    tl.store(out_at, out, mask=out_mask)
    if not WHOLE:
        tl.store(lse_ptr + out_row, maximum * scale + tl.log2(total) * LN2, mask=live)


@triton.jit
def _merged(parts_ptr, parts_lse_ptr, row, head, value, num_heads, splits, STEP: tl.constexpr, VALUE: tl.constexpr):
    """Columns ``value`` of the row's merged heads, [heads, values], always summed in the same order.

    A part of lse -inf has not been written and is not read.
    """
    maximum = tl.full(head.shape, float("-inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    acc = tl.zeros([head.shape[0], value.shape[0]], tl.float32)
    split = tl.arange(0, STEP)
    at = (row * splits + split[:, None]) * num_heads + head[None, :]
    is_head = (head < num_heads)[None, :]
    lse = tl.load(parts_lse_ptr + at, mask=(split < splits)[:, None] & is_head, other=float("-inf"))
    for start in range(0, splits, STEP):
        part = tl.load(
            parts_ptr + at[:, :, None] * VALUE + value[None, None, :],
            mask=(lse > float("-inf"))[:, :, None] & (value < VALUE)[None, None, :],
            other=0.0,
        )
        at += STEP * num_heads
        # Read at the same time as the parts: what the next mask waits for.
        left = (start + STEP + split < splits)[:, None] & is_head
        next_lse = tl.load(parts_lse_ptr + at, mask=left, other=float("-inf"))
        highest = tl.maximum(maximum, tl.max(lse, 0))
        # A row without tokens has no finite part; zero in its place keeps its weights zero instead of NaN.
        pivot = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(lse - pivot[None, :])
        keep = tl.exp(maximum - pivot)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep[:, None] + tl.sum(part * weight[:, :, None], 0)
        maximum, lse = highest, next_lse
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    parts_ptr, parts_lse_ptr, out_ptr,
    num_heads, splits,
    HEADS: tl.constexpr, STEP: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr,
    gate_ptr=None, gate_stride=0, gate_head_stride=0,
):  # fmt: skip
    """parts [N, splits, H, V] and their lse [N, splits, H] -> out [N, H, V], gated if there is a gate [N, H, V].

    grid (rows, head blocks, value blocks).
    """
    wait_for_kernel_ahead()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    value = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (head < num_heads)[:, None] & (value < VALUE)[None, :]
    if gate_ptr is not None:
        gate_at = gate_ptr + row * gate_stride + head[:, None] * gate_head_stride + value[None, :]
        gate = tl.load(gate_at, mask=inside, other=0.0)
    out = _merged(parts_ptr, parts_lse_ptr, row, head, value, num_heads, splits, STEP, VALUE)
    out = out.to(out_ptr.dtype.element_ty)
    if gate_ptr is not None:
        out = gated(out, gate)
    tl.store(out_ptr + (row * num_heads + head[:, None]) * VALUE + value[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_project_kernel(
    parts_ptr, parts_lse_ptr, w_ptr, out_ptr, scale_ptr,
    num_heads, splits, width, w_stride, w_col_stride, scale_row_stride, scale_group_stride,
    STEP: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The same, and each head's row times w [H, V, width] -> out [N, H * width]; V is dense.

    grid (rows * heads, blocks of TILES * COLUMNS columns). With LARGEST a block is a group of 128: out is of 8 bits,
    and ``scale`` takes the scales. Rounds after each step as ops of their own would.
    """
    wait_for_kernel_ahead()
    row, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    value = tl.arange(0, BLOCK_V)
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    context = _merged(parts_ptr, parts_lse_ptr, row, head + tl.arange(0, 1), value, num_heads, splits, STEP, VALUE)
    context = context.to(dtype).to(tl.float32)
    first, number = tl.program_id(1) * TILES * COLUMNS, tl.arange(0, TILES)[:, None]
    columns = tl.arange(0, COLUMNS)
    out = tl.zeros([TILES, COLUMNS], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        col = first + tile * COLUMNS + columns
        at = w_ptr + head.to(tl.int64) * w_stride + col[:, None] * w_col_stride + value[None, :]
        w = tl.load(at, mask=(col < width)[:, None] & (value < VALUE)[None, :], other=0.0).to(tl.float32)
        out = tl.where(number == tile, tl.sum(w * context, axis=1)[None, :], out)
    out = out.to(dtype)
    col = first + number * COLUMNS + columns[None, :]
    if LARGEST is None:
        tl.store(out_ptr + (row * num_heads + head) * width + col, out, mask=col < width)
    else:
        store_quantized(
            out, out_ptr, scale_ptr, row, head * width + first, row + 1, num_heads * width,
            scale_row_stride, scale_group_stride, LARGEST, TILES * COLUMNS,
        )  # fmt: skip
