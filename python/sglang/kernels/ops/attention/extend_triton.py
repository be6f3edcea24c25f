"""Triton bodies of attention with many queries a request: over cache slots or over packed rows, whole or in splits."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.decode_triton import LN2, LOG2E, load_columns


@triton.jit
def _find_request(tile, qo_indptr_ptr, batch, group, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """The request of a tile: request i owns tiles from ``first row // BLOCK_M + i`` on, as many as it needs or more."""
    request = 0
    for start in range(0, batch, BLOCK_B):
        requests = start + tl.arange(0, BLOCK_B)
        rows = tl.load(qo_indptr_ptr + requests, mask=requests < batch, other=0) * group
        starts = rows // BLOCK_M + requests
        request += tl.sum(((starts <= tile) & (requests < batch)).to(tl.int32), 0)
    return request - 1


@triton.jit
def _attend(
    q, q_tail, k_ptr, tail_ptr, v_ptr, slots_ptr, acc, maximum, total, start, end, last_seen, scale2,
    k_stride, tail_stride, v_stride, keys, tails, values,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, VALUE_IS_KEY: tl.constexpr,
    KEY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens [start, end); with MASKED, row r sees tokens up to ``last_seen[r]``."""
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        # Past the end the last token is read again: another row may hold NaN, which a zero probability keeps.
        rows = tl.minimum(tokens, end - 1) if MASKED else tokens
        if PAGED:
            rows = tl.load(slots_ptr + rows)
        rows = rows.to(tl.int64)[:, None]
        k = load_columns(k_ptr + rows * k_stride + keys[None, :], (keys < MAIN)[None, :], MAIN, KEY, q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL > 0:
            tail_at = tail_ptr + rows * tail_stride + tails[None, :]
            k_tail = load_columns(tail_at, (tails < TAIL)[None, :], TAIL, BLOCK_T, q.dtype)
            logits = tl.dot(q_tail, tl.trans(k_tail), logits, input_precision="ieee")
        if MASKED:
            logits = tl.where(tokens[None, :] <= last_seen[:, None], logits, float("-inf"))
        highest = tl.maximum(maximum, tl.max(logits, 1))
        # A row that has seen nothing yet has no maximum; zero in its place keeps its sums zero instead of NaN.
        pivot = tl.where(highest == float("-inf"), 0.0, highest) * scale2 if MASKED else highest * scale2
        keep = tl.exp2(maximum * scale2 - pivot)
        probs = tl.exp2(logits * scale2 - pivot[:, None])
        total = total * keep + tl.sum(probs, 1)
        maximum = highest
        acc = acc * keep[:, None]
        if VALUE_IS_KEY:
            v = k
        else:
            v_at = v_ptr + rows * v_stride + values[None, :]
            v = load_columns(v_at, (values < VALUE)[None, :], VALUE, BLOCK_V, q.dtype)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision="ieee")
    return acc, maximum, total


# Slots and bounds are pieces of one upload, which start at any multiple of 8 bytes.
@triton.jit(
    do_not_specialize=["batch", "splits"],
    do_not_specialize_on_alignment=["slots_ptr", "qo_indptr_ptr", "kv_indptr_ptr"],
)
def extend_kernel(
    q_ptr, k_ptr, tail_ptr, v_ptr, slots_ptr, qo_indptr_ptr, kv_indptr_ptr, out_ptr, lse_ptr,
    scale, batch, num_heads, group, splits,
    q_stride, q_head_stride, k_stride, k_head_stride, tail_stride, tail_head_stride, v_stride, v_head_stride,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, VALUE_IS_KEY: tl.constexpr,
    KEY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, WRITE_LSE: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_M rows (token, head of the group) of one request and key head; its tokens share the key blocks.

    grid (key heads, tiles, splits) -> out [N, splits, H, V] and lse [N, splits, H] float32. The last TAIL columns of a
    key row lie at ``tail_ptr``, with strides of their own. With CAUSAL a request's queries are its last tokens.
    """
    kv_head = tl.program_id(0)
    # Late tiles of a causal request have the most keys: they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    split = tl.program_id(2)
    request = _find_request(tile, qo_indptr_ptr, batch, group, BLOCK_M, BLOCK_B)
    q_first = tl.load(qo_indptr_ptr + request)
    q_len = (tl.load(qo_indptr_ptr + request + 1) - q_first).to(tl.int32)
    kv_first = tl.load(kv_indptr_ptr + request)
    kv_len = (tl.load(kv_indptr_ptr + request + 1) - kv_first).to(tl.int32)
    tile_row = (tile - ((q_first * group) // BLOCK_M + request).to(tl.int32)) * BLOCK_M
    if tile_row >= q_len * group:
        return
    row = tile_row + tl.arange(0, BLOCK_M)
    token = row // group
    live = token < q_len
    heads = kv_head * group + row % group
    last_seen = kv_len - q_len + token if CAUSAL else tl.zeros([BLOCK_M], tl.int32) + kv_len - 1
    seen = kv_len
    unmasked = kv_len
    if CAUSAL:
        seen = tl.minimum(kv_len, kv_len - q_len + (tile_row + BLOCK_M - 1) // group + 1)
        unmasked = kv_len - q_len + tile_row // group + 1
    span = tl.cdiv(tl.cdiv(kv_len, splits), BLOCK_N) * BLOCK_N
    start = tl.minimum(split * span, seen)
    end = tl.minimum(start + span, seen)
    middle = start + tl.maximum(tl.minimum(unmasked, end) - start, 0) // BLOCK_N * BLOCK_N

    keys = tl.arange(0, KEY)
    values = tl.arange(0, BLOCK_V)
    tails = tl.arange(0, BLOCK_T)
    q_at = q_ptr + (q_first + token)[:, None] * q_stride + heads[:, None] * q_head_stride
    q = tl.load(q_at + keys[None, :], mask=live[:, None] & (keys < MAIN)[None, :], other=0.0)
    q_tail = q
    if TAIL > 0:
        q_tail = tl.load(q_at + MAIN + tails[None, :], mask=live[:, None] & (tails < TAIL)[None, :], other=0.0)
    slots_ptr += kv_first
    k_ptr += kv_head * k_head_stride
    tail_ptr += kv_head * tail_head_stride
    v_ptr += kv_head * v_head_stride
    if not PAGED:
        k_ptr += kv_first * k_stride
        tail_ptr += kv_first * tail_stride
        v_ptr += kv_first * v_stride
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    scale2 = scale * LOG2E
    acc, maximum, total = _attend(
        q, q_tail, k_ptr, tail_ptr, v_ptr, slots_ptr, acc, maximum, total, start, middle, last_seen, scale2,
        k_stride, tail_stride, v_stride, keys, tails, values,
        MAIN, TAIL, VALUE, VALUE_IS_KEY, KEY, BLOCK_T, BLOCK_V, BLOCK_N, PAGED, False,
    )  # fmt: skip
    acc, maximum, total = _attend(
        q, q_tail, k_ptr, tail_ptr, v_ptr, slots_ptr, acc, maximum, total, middle, end, last_seen, scale2,
        k_stride, tail_stride, v_stride, keys, tails, values,
        MAIN, TAIL, VALUE, VALUE_IS_KEY, KEY, BLOCK_T, BLOCK_V, BLOCK_N, PAGED, True,
    )  # fmt: skip
    out_row = ((q_first + token) * splits + split) * num_heads + heads
    if WRITE_LSE:
        # NaN is no part of weight 0: its lse is NaN.
        lse = tl.where(total == 0.0, float("-inf"), maximum * scale + tl.log2(total) * LN2)
        tl.store(lse_ptr + out_row, lse, mask=live)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_mask = live[:, None] & (values < VALUE)[None, :]
    tl.store(out_ptr + out_row[:, None] * VALUE + values[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
