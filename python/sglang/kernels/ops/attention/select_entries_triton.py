"""Triton bodies that score entries and keep the best of each row: two launches, no sort."""

import triton
import triton.language as tl

from sglang.kernels.ops.sampling.scores_triton import ordered_bits

# Bits that a pass of the search settles, and the numbers that they take.
DIGIT = tl.constexpr(8)
DIGITS = tl.constexpr(256)


@triton.jit(do_not_specialize=["first_row", "num_columns"])
def score_entries_kernel(
    q_ptr, weights_ptr, keys_ptr, scales_ptr, table_ptr, requests_ptr, visible_ptr, scores_ptr,
    first_row, num_columns,
    q_stride, q_head_stride, weight_stride, key_stride, scale_stride, table_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_PAGE: tl.constexpr, TOP_K: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """grid (rows, programs): the programs of a row walk its entries in turn -> scores [rows, num_columns] float32.

    A row that sees no more than TOP_K entries needs no scores, and what it does not see has none.
    """
    line = tl.program_id(0).to(tl.int64)
    row = line + first_row
    seen = tl.load(visible_ptr + row).to(tl.int32)
    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (head < HEADS)[:, None] & (column < DIM)[None, :]
    q = tl.load(q_ptr + row * q_stride + head[:, None] * q_head_stride + column[None, :], mask=inside, other=0.0)
    weights = tl.load(weights_ptr + row * weight_stride + head, mask=head < HEADS, other=0.0).to(tl.float32)
    table = table_ptr + tl.load(requests_ptr + row) * table_stride
    blocks = tl.where(seen > TOP_K, tl.cdiv(seen, BLOCK_N), 0)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        entry = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = entry < seen
        page = tl.load(table + entry // PER_PAGE, mask=there, other=0).to(tl.int64)
        place = entry % PER_PAGE
        at = keys_ptr + page * key_stride + place * DIM
        if not HAS_SCALES:
            at = keys_ptr + (page * PER_PAGE + place) * key_stride
        keys = tl.load(at[:, None] + column[None, :], mask=there[:, None] & (column < DIM)[None, :], other=0.0)
        products = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        score = tl.sum(tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[:, None], 0)
        if HAS_SCALES:
            score *= tl.load(scales_ptr + page * scale_stride + place, mask=there, other=0.0)
        tl.store(scores_ptr + line * num_columns + entry, score, mask=there)


@triton.jit
def _keys(scores_at, entry, seen):
    """Numbers of 32 bits in the order of the scores, NaN above all, and which entries there are."""
    there = entry < seen
    score = tl.load(scores_at + entry, mask=there, other=0.0)
    key = tl.where(score == score, ordered_bits(score), 0x7FFFFFFF)
    return key.to(tl.uint32, bitcast=True) ^ 0x80000000, there


@triton.jit(do_not_specialize=["first_row", "num_columns"])
def pick_entries_kernel(
    scores_ptr, visible_ptr, chosen_ptr, first_row, num_columns, chosen_stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (rows): the entries of the TOP_K best scores, ascending, of equal scores the lowest; -1 behind the last.

    The TOP_K-th best score is found digit by digit, from counts of the entries that share its digits so far.
    """
    line = tl.program_id(0).to(tl.int64)
    row = line + first_row
    seen = tl.load(visible_ptr + row).to(tl.int32)
    out = chosen_ptr + row * chosen_stride
    if seen <= TOP_K:
        for start in range(0, WIDTH, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            tl.store(out + place, tl.where(place < seen, place, -1), mask=place < WIDTH)
        return
    scores_at = scores_ptr + line * num_columns
    digit = tl.arange(0, DIGITS)
    found = tl.full([], 0, tl.uint32)
    left = tl.full([], TOP_K, tl.int32)
    for shift in tl.static_range(32 - DIGIT, -1, -DIGIT):
        counts = tl.zeros([DIGITS], tl.int32)
        for start in range(0, seen, BLOCK):
            key, there = _keys(scores_at, start + tl.arange(0, BLOCK), seen)
            # The digits above this one; none at first, where a shift by all bits has no meaning.
            if shift < 32 - DIGIT:
                there = there & ((key >> (shift + DIGIT)) == (found >> (shift + DIGIT)))
            counts += tl.histogram(((key >> shift) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=there)
        from_here = tl.cumsum(counts, 0, reverse=True)
        chosen = tl.max(tl.where(from_here >= left, digit, 0), 0)
        left -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        found = found | (chosen.to(tl.uint32) << shift)
    taken = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    for start in range(0, seen, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        key, there = _keys(scores_at, entry, seen)
        same = (there & (key == found)).to(tl.int32)
        rank = equal + tl.cumsum(same, 0)
        wanted = (there & (key > found)) | ((same > 0) & (rank <= left))
        place = taken + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(out + place, entry, mask=wanted)
        taken += tl.sum(wanted.to(tl.int32), 0)
        equal += tl.sum(same, 0)
