"""Triton body of attention over rows of each query's own: window, then entries, one softmax, nothing gathered."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.decode_triton import LN2, LOG2E
from sglang.kernels.ops.attention.packed_rows_triton import exponent_to_scale


@triton.jit
def load_row_tile(
    cache_ptr, scales_ptr, page_stride, scale_page_stride, ids, there,
    PER_PAGE: tl.constexpr, WIDTH: tl.constexpr, NUM_SCALES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows ``ids`` [N] int64 of a cache as ``store_rows_torch`` has it -> [N, BLOCK_D] DTYPE, 0 where not ``there``.

    WIDTH 0: plain rows, page_stride elements apart.
    """
    if WIDTH == 0:
        column = tl.arange(0, BLOCK_D)[None, :]
        at = cache_ptr + ids[:, None] * page_stride + column
        tile = tl.load(at, mask=there[:, None] & (column < DIM), other=0.0).to(DTYPE)
    else:
        # A group of columns has one scale; the last columns of a row are bfloat16 behind the bytes of the others.
        plain: tl.constexpr = 2 * DIM - WIDTH
        columns: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D
        groups: tl.constexpr = BLOCK_D // columns
        lane = tl.arange(0, columns)
        group = tl.arange(0, groups)
        column = group[None, :, None] * columns + lane[None, None, :]
        page, place = ids // PER_PAGE, ids % PER_PAGE
        at = (cache_ptr + page * page_stride + place * WIDTH).to(tl.pointer_type(tl.uint8))
        bits = tl.load(at[:, None, None] + column, mask=there[:, None, None] & (column < plain), other=0)
        scale_at = (scales_ptr + page * scale_page_stride + place * NUM_SCALES)[:, None] + group[None, :]
        has_scale = there[:, None] & (group * columns < plain)[None, :]
        scale = exponent_to_scale(tl.load(scale_at, mask=has_scale, other=0))
        in_tail = (lane >= plain % columns) & (lane < plain % columns + DIM - plain)
        tail_at = (at + plain).to(tl.pointer_type(tl.bfloat16))[:, None] + (lane - plain % columns)[None, :]
        tail = tl.load(tail_at, mask=there[:, None] & in_tail[None, :], other=0.0).to(tl.float32)
        values = bits.to(cache_ptr.dtype.element_ty, bitcast=True).to(tl.float32) * scale[:, :, None]
        tile = tl.where(column < plain, values, tl.where(column < DIM, tail[:, None, :], 0.0)).to(DTYPE)
        tile = tl.reshape(tile, [ids.shape[0], BLOCK_D])
    return tile


@triton.jit
def _attend_tile(q, k, there, maximum, total, acc, scale2):
    """A block of rows in the running softmax, whose logits are in powers of two."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
    logits = tl.where(there[None, :], logits, float("-inf"))
    highest = tl.maximum(maximum, tl.max(logits, 1))
    # Where nothing has been seen yet and there is no sink, zero in its place keeps weights zero instead of NaN.
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    keep = tl.exp2(maximum - pivot)
    weights = tl.exp2(logits - pivot[:, None])
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(k.dtype), k, acc * keep[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit(do_not_specialize=["splits", "num_window", "num_chosen"])
def sparse_attention_kernel(
    q_ptr, window_ptr, window_scales_ptr, window_rows_ptr, sinks_ptr,
    entries_ptr, entry_scales_ptr, chosen_ptr, table_ptr, requests_ptr, visible_ptr, out_ptr, lse_ptr,
    scale, num_heads, splits, num_window, num_chosen,
    q_stride, q_head_stride, window_stride, window_scale_stride, window_rows_stride,
    entry_stride, entry_scale_stride, chosen_stride, table_stride,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, WINDOW_WIDTH: tl.constexpr, WINDOW_SCALES: tl.constexpr,
    ENTRY_PAGE: tl.constexpr, ENTRY_WIDTH: tl.constexpr, ENTRY_SCALES: tl.constexpr,
    HAS_ENTRIES: tl.constexpr, CHOSEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """grid (rows * head blocks, splits), so that those who read the same rows run together.

    Blocks of the window and then of the entries are dealt to splits in order; the first split has the sink. -> out
    [N, splits, H, D] and lse [N, splits, H] float32, or with WHOLE (one split) out [N, H, D] in its own dtype.
    """
    head_blocks = tl.cdiv(num_heads, BLOCK_H)
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    split = tl.program_id(1)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < num_heads
    column = tl.arange(0, BLOCK_D)
    q_at = q_ptr + row * q_stride + head[:, None] * q_head_stride + column[None, :]
    q = tl.load(q_at, mask=live[:, None] & (column < DIM)[None, :], other=0.0)
    window_blocks = tl.cdiv(num_window, BLOCK_N)
    blocks = window_blocks
    seen = 0
    if HAS_ENTRIES:
        seen = tl.load(visible_ptr + row).to(tl.int32)
        if CHOSEN:
            seen = tl.minimum(seen, num_chosen)
        blocks += tl.cdiv(seen, BLOCK_N)
    share = tl.cdiv(blocks, splits)
    first = split * share
    last = tl.minimum(first + share, blocks)
    sink = tl.load(sinks_ptr + head, mask=live, other=float("-inf")) * LOG2E
    sink = tl.where(split == 0, sink, float("-inf"))
    maximum = sink
    total = tl.where(sink > float("-inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E
    lane = tl.arange(0, BLOCK_N)
    for block in range(first, tl.minimum(last, window_blocks)):
        place = block * BLOCK_N + lane
        ids = tl.load(window_rows_ptr + row * window_rows_stride + place, mask=place < num_window, other=-1).to(
            tl.int64
        )
        there = ids >= 0
        k = load_row_tile(
            window_ptr, window_scales_ptr, window_stride, window_scale_stride, ids, there,
            WINDOW_PAGE, WINDOW_WIDTH, WINDOW_SCALES, DIM, BLOCK_D, q.dtype,
        )  # fmt: skip
        maximum, total, acc = _attend_tile(q, k, there, maximum, total, acc, scale2)
    if HAS_ENTRIES:
        table = table_ptr + tl.load(requests_ptr + row) * table_stride
        for block in range(tl.maximum(first - window_blocks, 0), last - window_blocks):
            entry = block * BLOCK_N + lane
            there = entry < seen
            if CHOSEN:
                entry = tl.load(chosen_ptr + row * chosen_stride + entry, mask=there, other=-1)
                there = entry >= 0
            page = tl.load(table + entry // ENTRY_PAGE, mask=there, other=0).to(tl.int64)
            ids = page * ENTRY_PAGE + entry % ENTRY_PAGE
            k = load_row_tile(
                entries_ptr, entry_scales_ptr, entry_stride, entry_scale_stride, ids, there,
                ENTRY_PAGE, ENTRY_WIDTH, ENTRY_SCALES, DIM, BLOCK_D, q.dtype,
            )  # fmt: skip
            maximum, total, acc = _attend_tile(q, k, there, maximum, total, acc, scale2)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (row * splits + split) * num_heads + head
    out_mask = live[:, None] & (column < DIM)[None, :]
    tl.store(out_ptr + out_row[:, None] * DIM + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    if not WHOLE:
        lse = tl.where(total == 0.0, float("-inf"), (maximum + tl.log2(total)) * LN2)
        tl.store(lse_ptr + out_row, lse, mask=live)
