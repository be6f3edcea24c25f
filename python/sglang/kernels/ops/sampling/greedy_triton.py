"""Arg-max over the vocabulary: the value's order and the index in one 64-bit key, so that a maximum is the answer."""

import triton
import triton.language as tl


@triton.jit
def order_key(x, index):
    """A 64-bit integer that grows with ``x`` (NaN above all, -0.0 equal to 0.0) and, among equals, falls with index."""
    wide = x.to(tl.float32)
    wide = tl.where(wide == 0.0, 0.0, wide)
    bits = wide.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(wide != wide, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def key_index(key):
    """The index inside an ``order_key``."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["splits", "steps"])
def greedy_kernel(
    logits_ptr, out_ptr, vocab, row_stride, col_stride, splits, steps, IS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program takes ``steps`` blocks of one row; it writes the row's index when IS_LAST, else its best key."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    lane = tl.arange(0, BLOCK)
    lowest: tl.constexpr = -0x8000000000000000
    best = tl.full([BLOCK], lowest, tl.int64)
    for step in range(steps):
        cols = (split * steps + step) * BLOCK + lane
        mask = cols < vocab
        x = tl.load(logits_ptr + row * row_stride + cols.to(tl.int64) * col_stride, mask=mask, other=0.0)
        best = tl.maximum(best, tl.where(mask, order_key(x, cols), lowest))
    top = tl.max(best, axis=0)
    if IS_LAST:
        tl.store(out_ptr + row, key_index(top))
    else:
        tl.store(out_ptr + row * splits + split, top)


@triton.jit(do_not_specialize=["splits"])
def greedy_merge_kernel(keys_ptr, out_ptr, splits, BLOCK: tl.constexpr):
    """The index of the best of a row's ``splits`` keys."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * splits + lane, mask=lane < splits, other=-0x8000000000000000)
    tl.store(out_ptr + row, key_index(tl.max(keys, axis=0)))
