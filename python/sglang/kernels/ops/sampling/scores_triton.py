"""What the kernels of a draw share: the scores of a row, their weights and order, its filters, sums made at once."""

import triton
import triton.language as tl

# Bits of a mark beside the count of an id in the output; ``draw.py`` has the same numbers.
COUNT = tl.constexpr(0x1FFFFFFF)
SEEN = tl.constexpr(0x20000000)
STOP = tl.constexpr(0x40000000)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def ordered_bits(x):
    """An int32 that grows with the float32 ``x`` (-0.0 equal to 0.0); not for NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def ordered_float(bits):
    """The float32 that ``ordered_bits`` came from."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _sum_2(a, b):
    """Two sums by one reduction, which waits for the other warps once."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def _sum_4(a, b, c, d):
    """Four sums by one reduction."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    sum_a, sum_b = tl.split(ab)
    sum_c, sum_d = tl.split(cd)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def _sum_3(a, b, c):
    """Three sums by one reduction, of fours first, which need no registers beside each other."""
    a, b, c = _sum_fours(a), _sum_fours(b), _sum_fours(c)
    sum_a, sum_b, sum_c, _ = _sum_4(a, b, c, c)
    return sum_a, sum_b, sum_c


@triton.jit
def _sum_fours(x):
    if x.shape[0] >= 4:
        x = tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), axis=1)
    return x


@triton.jit
def _weight(y, best, scale):
    """e to the power of (y - best) over the temperature, ``scale`` being log2(e) over it; 0 for -inf, NaN for NaN."""
    return tl.where(y == float("-inf"), 0.0, tl.exp2((y - best) * scale))


@triton.jit
def _scale(row, temps_ptr):
    return LOG2_E / tl.load(temps_ptr + row)


@triton.jit
def _scores(row, cols, source, EDITED: tl.constexpr):
    """Logits as the model gave them, and after edits and mask; both -inf past the vocabulary.

    What is absent is known at run time: ``words`` 0 is no mask, ``edits`` 0 no edits, ``biased`` 0 no bias. Where a row
    has no edit, its marks are 0 and its penalties, the first ones there, have no effect.

    What temperature divides alike keeps its order, so that only weights know of it.
    """
    logits_ptr, _, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr = source[:8]
    vocab, row_stride, words, edits, biased = source[8], source[9], source[10], source[11], source[12]
    inside = cols < vocab
    raw = tl.load(logits_ptr + row * row_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    x = raw
    if EDITED:
        edit = tl.where(edits != 0, tl.load(edit_rows_ptr + row * edits), -1).to(tl.int64)
        past = tl.where(edit >= 0, vocab, 0)
        edit = tl.maximum(edit, 0)
        mark = tl.load(marks_ptr + edit * vocab + cols, mask=cols < past, other=0)
        frequency = tl.load(penalties_ptr + edit * 3)
        presence = tl.load(penalties_ptr + edit * 3 + 1)
        repetition = tl.load(penalties_ptr + edit * 3 + 2)
        count = (mark & COUNT).to(tl.float32)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((mark & SEEN) != 0, repeated, x)
        x = tl.where(count > 0, x - (frequency * count + presence), x)
        x += tl.load(bias_ptr + edit * vocab + cols, mask=cols < past * biased, other=0.0)
        x = tl.where(((mark & STOP) != 0) & (tl.load(left_ptr + edit) > 0), float("-inf"), x)
        word = tl.load(allowed_ptr + row * words + (cols >> 5), mask=cols < tl.where(words != 0, vocab, 0), other=-1)
        x = tl.where(((word >> (cols & 31)) & 1) != 0, x, float("-inf"))
    return raw, x


@triton.jit
def _tops(row, tops_ptr, chunks, CHUNKS: tl.constexpr):
    """The best scores of a row's chunks."""
    chunk = tl.arange(0, CHUNKS)
    return tl.load(tops_ptr + row * CHUNKS + chunk, mask=chunk < chunks, other=float("-inf"))


@triton.jit
def _chunk_masses(row, tops, best, scale, sums_ptr, chunks, CHUNKS: tl.constexpr):
    """The mass of each chunk, where the row's best score weighs 1."""
    chunk = tl.arange(0, CHUNKS)
    sums = tl.load(sums_ptr + row * CHUNKS + chunk, mask=chunk < chunks, other=0.0)
    return tl.where(sums == 0.0, 0.0, sums * _weight(tops, best, scale))


@triton.jit
def _filters(row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab):
    """top-k (``vocab``: all), top-p (1: all) and min-p (0: all) of a row."""
    wanted = tl.load(top_ks_ptr + row).to(tl.int64)
    k = tl.where((wanted < 1) | (wanted > vocab), vocab, wanted).to(tl.int32)
    return k, tl.load(top_ps_ptr + row), tl.load(min_ps_ptr + row)
