"""Arg-max over the vocabulary in one pass: order of a value and its index in one 64-bit key, whose maximum is taken."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead

LOWEST_KEY = tl.constexpr(-0x8000000000000000)
LOGITS_FAULT = tl.constexpr(1)  # what ``greedy.py`` calls so


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


@triton.jit
def _store(row, key, ids_ptr, faults_ptr):
    """The answer that a row's best key holds: only of a finite value is it sound."""
    order = (key >> 32).to(tl.int32)
    # By ``order_key``: 0x7F800000 is +inf, NaN lies above it, and -inf is the lowest.
    sound = (order < 0x7F800000) & (order > -0x7F800001)
    tl.store(ids_ptr + row, key_index(key))
    tl.store(faults_ptr + row, tl.where(sound, 0, LOGITS_FAULT).to(tl.int64))


@triton.jit(do_not_specialize=["chunks"])
def greedy_kernel(
    logits_ptr, keys_ptr, ids_ptr, faults_ptr, vocab, row_stride, col_stride, chunks,
    IS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its best key, or the row's answer when IS_LAST."""
    wait_for_kernel_ahead()
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    cols = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = cols < vocab
    x = tl.load(logits_ptr + row * row_stride + cols.to(tl.int64) * col_stride, mask=inside, other=0.0)
    key = tl.max(tl.where(inside, order_key(x, cols), LOWEST_KEY), axis=0)
    if IS_LAST:
        _store(row, key, ids_ptr, faults_ptr)
    else:
        tl.store(keys_ptr + row * chunks + chunk, key)


@triton.jit(do_not_specialize=["chunks"])
def greedy_merge_kernel(keys_ptr, ids_ptr, faults_ptr, chunks, BLOCK: tl.constexpr):
    """The answer of a row by the best of its chunks' keys."""
    wait_for_kernel_ahead()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * chunks + lane, mask=lane < chunks, other=LOWEST_KEY)
    _store(row, tl.max(keys, axis=0), ids_ptr, faults_ptr)
