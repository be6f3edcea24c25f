"""The next token of each row in two launches, four with a filter; no launch sorts the vocabulary.

``scan_kernel`` reads each chunk of each row once: its best score, its mass and every STRIDE-th score. From those
``bracket_kernel`` estimates between which two scores the filter cuts the row; ``sift_kernel`` reads the rows again
and keeps the few scores between them; ``pick_kernel`` finds the exact cut there, the chunk that the draw falls into,
and the id in it. Where the estimate was wrong or the kept scores do not fit, it searches the row itself: slower, but
the same cut.
"""

import triton
import triton.language as tl

# Bits of a mark beside the count of an id in the output; ``draw.py`` has the same numbers.
COUNT = tl.constexpr(0x1FFFFFFF)
SEEN = tl.constexpr(0x20000000)
STOP = tl.constexpr(0x40000000)
# Standard deviations that an estimate may be off.
DEVIATIONS = tl.constexpr(5.0)
# Below the best score by this much a weight is 0 in float32.
DEPTH = tl.constexpr(110.0)
BISECTIONS = tl.constexpr(14)
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a row's numbers lie in ``state``.
LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
FLOOR = tl.constexpr(2)
BEST = tl.constexpr(3)
STATE = tl.constexpr(4)
# What ``draw.py`` calls them.
LOGITS_FAULT = tl.constexpr(1)
EDITED_FAULT = tl.constexpr(2)
LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
LOWEST_BITS = tl.constexpr(-0x7F800000)  # ``ordered_bits`` of the same


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
def _weight(y, best, scale):
    """e to the power of (y - best) over the temperature, ``scale`` being log2(e) over it; 0 for -inf, NaN for NaN."""
    return tl.where(y == float("-inf"), 0.0, tl.exp2((y - best) * scale))


@triton.jit
def _scale(row, temps_ptr):
    return LOG2_E / tl.load(temps_ptr + row)


@triton.jit
def _scores(row, cols, source, MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr):
    """Logits as the model gave them, and after edits and mask; both -inf past the vocabulary.

    What temperature divides alike keeps its order, so that only weights know of it.
    """
    logits_ptr, _, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr = source[:8]
    vocab, row_stride, words = source[8], source[9], source[10]
    inside = cols < vocab
    raw = tl.load(logits_ptr + row * row_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    x = raw
    if EDITED:
        edit = tl.load(edit_rows_ptr + row).to(tl.int64)
        wanted = cols < tl.where(edit >= 0, vocab, 0)
        edit = tl.maximum(edit, 0)
        mark = tl.load(marks_ptr + edit * vocab + cols, mask=wanted, other=0)
        frequency = tl.load(penalties_ptr + edit * 3)
        presence = tl.load(penalties_ptr + edit * 3 + 1)
        repetition = tl.load(penalties_ptr + edit * 3 + 2)
        count = (mark & COUNT).to(tl.float32)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((mark & SEEN) != 0, repeated, x)
        x = tl.where(count > 0, x - (frequency * count + presence), x)
        if BIASED:
            x += tl.load(bias_ptr + edit * vocab + cols, mask=wanted, other=0.0)
        x = tl.where(((mark & STOP) != 0) & (tl.load(left_ptr + edit) > 0), float("-inf"), x)
    if MASKED:
        word = tl.load(allowed_ptr + row * words + (cols >> 5), mask=inside, other=0)
        x = tl.where(((word >> (cols & 31)) & 1) != 0, x, float("-inf"))
    return raw, x


@triton.jit(do_not_specialize=["chunks", "words"])
def scan_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, chunks,
    tops_ptr, firsts_ptr, raws_ptr, sums_ptr, samples_ptr,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr, FILTER: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its best score and where it is first, the best raw logit, the mass, the sample."""
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words)  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    lane = tl.arange(0, BLOCK)
    cols = chunk * BLOCK + lane
    inside = cols < vocab
    raw, y = _scores(row, cols, source, MASKED, EDITED, BIASED)
    top = tl.max(y, axis=0)
    at = row * CHUNKS + chunk
    tl.store(tops_ptr + at, top)
    tl.store(firsts_ptr + at, tl.min(tl.where((y == top) & inside, cols, 0x7FFFFFFF), axis=0))
    # A row with NaN has a sum of NaN, whatever a maximum makes of it.
    tl.store(sums_ptr + at, tl.sum(_weight(y, top, _scale(row, temps_ptr)), axis=0))
    if EDITED or MASKED:
        nans = tl.max((raw != raw).to(tl.int32), axis=0)
        tl.store(raws_ptr + at, tl.where(nans > 0, float("nan"), tl.max(raw, axis=0)))
    if FILTER:
        tl.store(samples_ptr + (at * BLOCK + lane) // STRIDE, y, mask=lane % STRIDE == 0)


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
def _filters(
    row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr
):
    """top-k (``vocab``: all), top-p (1: all) and min-p (0: all) of a row."""
    k, p, m = vocab, 1.0, 0.0
    if TOP_K:
        wanted = tl.load(top_ks_ptr + row).to(tl.int64)
        k = tl.where((wanted < 1) | (wanted > vocab), vocab, wanted).to(tl.int32)
    if TOP_P:
        p = tl.load(top_ps_ptr + row)
    if MIN_P:
        m = tl.load(min_ps_ptr + row)
    return k, p, m


@triton.jit
def _mass_below(mid, y, w, best, scale):
    """Mass of the sample below ``mid``, and how far the row's own may be off."""
    below = tl.where(y < mid, w, 0.0)
    error = DEVIATIONS * tl.sqrt(tl.sum(below * below, axis=0)) + _weight(mid, best, scale)
    return tl.sum(below, axis=0), error


@triton.jit(do_not_specialize=["chunks"])
def bracket_kernel(
    temps_ptr, tops_ptr, sums_ptr, samples_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, greedy_ptr, state_ptr,
    vocab, chunks,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores LOW <= HIGH between which the cut of a row lies, very likely, and the score FLOOR of its min-p.

    A sample of one score in STRIDE tells the mass below a score, and how far off that may be; from below, as the few
    large weights of a row are what a sample misses. WHOLE: all scores fit, and none is ruled out.
    """
    row = tl.program_id(0).to(tl.int64)
    tops = _tops(row, tops_ptr, chunks, CHUNKS)
    best, scale = tl.max(tops, axis=0), _scale(row, temps_ptr)
    k, p, m = _filters(row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab, TOP_K, TOP_P, MIN_P)
    drawn = tl.load(greedy_ptr + row) == 0
    cuts = drawn & ((k < vocab) | (p < 1.0))
    low = tl.where(cuts, LOWEST_FLOAT, float("inf"))
    high = tl.where(cuts, float("inf"), float("inf"))
    if cuts & (not WHOLE):
        spare = (1.0 - p) * tl.sum(_chunk_masses(row, tops, best, scale, sums_ptr, chunks, CHUNKS), axis=0) / STRIDE
        share = k.to(tl.float32) / STRIDE
        needed = share + DEVIATIONS * tl.sqrt(share) + DEVIATIONS
        lane = tl.arange(0, CHUNKS * BLOCK // STRIDE)
        held = lane < chunks * (BLOCK // STRIDE)
        y = tl.load(samples_ptr + row * (CHUNKS * BLOCK // STRIDE) + lane, mask=held, other=float("-inf"))
        w = _weight(y, best, scale)
        deepest = best - DEPTH * tl.load(temps_ptr + row)
        low_yes, low_no, high_no, high_yes = deepest, best, deepest, best
        for _ in range(BISECTIONS):
            mid = (low_yes + low_no) * 0.5
            mass, error = _mass_below(mid, y, w, best, scale)
            fits = mass + error <= spare
            if TOP_K:
                fits = tl.where(k < vocab, tl.sum((y >= mid).to(tl.float32), axis=0) >= needed, fits)
            low_yes, low_no = tl.where(fits, mid, low_yes), tl.where(fits, low_no, mid)
            if TOP_P:
                mid = (high_yes + high_no) * 0.5
                mass, error = _mass_below(mid, y, w, best, scale)
                fits = mass - error >= spare
                high_yes, high_no = tl.where(fits, mid, high_yes), tl.where(fits, high_no, mid)
        low = tl.where(low_yes > deepest, low_yes, LOWEST_FLOAT)
        high = tl.where((high_yes < best) & (k >= vocab), high_yes, float("inf"))
    tl.store(state_ptr + row * STATE + LOW, low)
    tl.store(state_ptr + row * STATE + HIGH, high)
    tl.store(
        state_ptr + row * STATE + FLOOR,
        tl.where(drawn & (m > 0.0), best + tl.log(m) * tl.load(temps_ptr + row), LOWEST_FLOAT),
    )
    tl.store(state_ptr + row * STATE + BEST, best)


@triton.jit(do_not_specialize=["chunks", "words"])
def sift_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, chunks,
    state_ptr, found_ptr, counts_ptr, above_ptr, floored_ptr,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its scores from LOW to HIGH in id order, the mass above HIGH, the mass from FLOOR on."""
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words)  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    low, high = tl.load(state_ptr + row * STATE + LOW), tl.load(state_ptr + row * STATE + HIGH)
    floor = tl.load(state_ptr + row * STATE + FLOOR)
    if (low < float("inf")) | (floor > LOWEST_FLOAT):
        _, y = _scores(row, chunk * BLOCK + tl.arange(0, BLOCK), source, MASKED, EDITED, BIASED)
        w = _weight(y, tl.load(state_ptr + row * STATE + BEST), _scale(row, temps_ptr))
        at = row * CHUNKS + chunk
        between = ((y >= low) & (y <= high)).to(tl.int32)
        # A running sum within short rows, and one over the rows: a sum over all lanes goes through memory far oftener.
        lines = tl.reshape(between, [BLOCK // LINE, LINE])
        of_line = tl.sum(lines, axis=1)
        before = tl.cumsum(of_line, axis=0) - of_line
        place = tl.reshape(tl.cumsum(lines, axis=1) + before[:, None], [BLOCK]) - 1
        tl.store(found_ptr + at * CAP + place, y, mask=(between != 0) & (place < CAP))
        tl.store(counts_ptr + at, tl.sum(between, axis=0))
        tl.store(above_ptr + at, tl.sum(tl.where(y > high, w, 0.0), axis=0))
        tl.store(floored_ptr + at, tl.sum(tl.where(y >= floor, w, 0.0), axis=0))


@triton.jit
def _from(
    cut_1, cut_2, cut_3, found, weights, best, scale, row, source, chunks,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, RESCUE: tl.constexpr,
    COUNT_THEM: tl.constexpr,
):  # fmt: skip
    """Mass, or number, of scores from each of three cuts on (``ordered_bits``): of those found, or of the row."""
    cut_1, cut_2, cut_3 = cut_1.to(tl.int32), cut_2.to(tl.int32), cut_3.to(tl.int32)
    if RESCUE:
        part_1 = tl.zeros([BLOCK], tl.float32)
        part_2, part_3 = part_1, part_1
        for chunk in range(chunks):
            _, y = _scores(row, chunk * BLOCK + tl.arange(0, BLOCK), source, MASKED, EDITED, BIASED)
            bits, w = ordered_bits(y), _weight(y, best, scale)
            if COUNT_THEM:
                w = tl.where(y == float("-inf"), 0.0, 1.0)
            part_1 += tl.where(bits >= cut_1, w, 0.0)
            part_2 += tl.where(bits >= cut_2, w, 0.0)
            part_3 += tl.where(bits >= cut_3, w, 0.0)
    else:
        w = weights
        if COUNT_THEM:
            w = weights * 0.0 + 1.0
        part_1 = tl.where(found >= cut_1, w, 0.0)
        part_2 = tl.where(found >= cut_2, w, 0.0)
        part_3 = tl.where(found >= cut_3, w, 0.0)
    return tl.sum(part_1, axis=0), tl.sum(part_2, axis=0), tl.sum(part_3, axis=0)


@triton.jit
def _search(
    yes, no, goal, found, weights, best, scale, row, source, chunks,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, RESCUE: tl.constexpr,
    COUNT_THEM: tl.constexpr,
):  # fmt: skip
    """The last cut in [yes, no) from which on mass or number reach ``goal``; int64, a quarter of the way at a time."""
    while no - yes > 1:
        quarter = tl.maximum((no - yes) >> 2, 1)
        mid_1, mid_2, mid_3 = yes + quarter, yes + ((no - yes) >> 1), no - quarter
        sum_1, sum_2, sum_3 = _from(
            mid_1, mid_2, mid_3, found, weights, best, scale, row, source, chunks,
            MASKED, EDITED, BIASED, BLOCK, RESCUE, COUNT_THEM,
        )  # fmt: skip
        yes = tl.where(sum_3 >= goal, mid_3, tl.where(sum_2 >= goal, mid_2, tl.where(sum_1 >= goal, mid_1, yes)))
        # What is not enough by any comparison is too far, so that the interval shrinks whatever the sums are.
        up_to_3 = tl.where(sum_3 >= goal, no, mid_3)
        no = tl.where(sum_1 >= goal, tl.where(sum_2 >= goal, up_to_3, mid_2), mid_1)
    return yes


@triton.jit
def _cut(
    k, p, above, total, lowest, found, weights, best, scale, row, source, chunks,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """The lowest kept score as ``ordered_bits`` and how many of its ties are kept, by top-k and then by top-p.

    ``above`` is the mass above the scores found, ``lowest`` a bound from below.
    """
    vocab = source[8]
    yes, number = lowest.to(tl.int64), vocab
    no = ordered_bits(best).to(tl.int64) + 1
    if TOP_K:
        if k < vocab:
            yes = _search(
                yes, no, k.to(tl.float32), found, weights, best, scale, row, source, chunks,
                MASKED, EDITED, BIASED, BLOCK, RESCUE, True,
            )  # fmt: skip
            past = yes + 1
            count, _, _ = _from(
                past, past, past, found, weights, best, scale, row, source, chunks,
                MASKED, EDITED, BIASED, BLOCK, RESCUE, True,
            )  # fmt: skip
            mass, _, _ = _from(
                past, past, past, found, weights, best, scale, row, source, chunks,
                MASKED, EDITED, BIASED, BLOCK, RESCUE, False,
            )  # fmt: skip
            number = k - count.to(tl.int32)
            weight = _weight(ordered_float(yes.to(tl.int32)), best, scale)
            # At the bound there may be no score, or fewer than k: its weight is that of nothing, or of nothing much.
            total = mass + tl.where(yes > lowest, number.to(tl.float32) * weight, 0.0)
    if TOP_P:
        if p < 1.0:
            goal, start = p * total - above, yes
            yes = _search(
                yes, no, goal, found, weights, best, scale, row, source, chunks,
                MASKED, EDITED, BIASED, BLOCK, RESCUE, False,
            )  # fmt: skip
            past = yes + 1
            mass, _, _ = _from(
                past, past, past, found, weights, best, scale, row, source, chunks,
                MASKED, EDITED, BIASED, BLOCK, RESCUE, False,
            )  # fmt: skip
            weight = _weight(ordered_float(yes.to(tl.int32)), best, scale)
            ties = tl.ceil((goal - mass) / tl.maximum(weight, 1e-38))
            ties = tl.minimum(tl.maximum(ties, 1.0), 1e9).to(tl.int32)
            number = tl.where(yes > start, ties, tl.minimum(ties, number))
    return yes.to(tl.int32), number


@triton.jit
def _kept_of_row(
    cut, best, scale, row, source, chunks,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By chunk, read from the row: the mass above ``cut`` and the number of its ties."""
    slot = tl.arange(0, CHUNKS)
    masses, ties = tl.zeros([CHUNKS], tl.float32), tl.zeros([CHUNKS], tl.int32)
    for chunk in range(chunks):
        _, y = _scores(row, chunk * BLOCK + tl.arange(0, BLOCK), source, MASKED, EDITED, BIASED)
        bits = ordered_bits(y)
        masses = tl.where(slot == chunk, tl.sum(tl.where(bits > cut, _weight(y, best, scale), 0.0), axis=0), masses)
        ties = tl.where(slot == chunk, tl.sum((bits == cut).to(tl.int32), axis=0), ties)
    return masses, ties


@triton.jit
def _mix(x):
    """One round of ``seeded.py``'s 32-bit hash."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _uniform(seed, position):
    """``uniform_from_seed_torch`` of one row: float64 in [0, 1)."""
    word = _mix(_mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    return _mix(word ^ position.to(tl.uint32)).to(tl.float64) * 2.3283064365386963e-10


@triton.jit(do_not_specialize=["chunks", "words"])
def pick_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, chunks,
    top_ks_ptr, top_ps_ptr, min_ps_ptr, greedy_ptr, seeds_ptr, positions_ptr,
    tops_ptr, firsts_ptr, raws_ptr, sums_ptr, state_ptr, found_ptr, counts_ptr, above_ptr, floored_ptr,
    ids_ptr, faults_ptr,
    MASKED: tl.constexpr, EDITED: tl.constexpr, BIASED: tl.constexpr,
    DRAWS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row: where its filter cuts, the chunk that its draw falls into, and the id there."""
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words)  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CHUNKS)
    real = slot < chunks
    tops = _tops(row, tops_ptr, chunks, CHUNKS)
    best, scale = tl.max(tops, axis=0), _scale(row, temps_ptr)
    firsts = tl.load(firsts_ptr + row * CHUNKS + slot, mask=real, other=0x7FFFFFFF)
    chosen = tl.minimum(tl.min(tl.where(tops == best, firsts, 0x7FFFFFFF), axis=0), vocab - 1)
    masses = _chunk_masses(row, tops, best, scale, sums_ptr, chunks, CHUNKS)
    nans = tl.max((masses != masses).to(tl.int32), axis=0)
    # NaN and infinities alike are not below infinity.
    scores = tl.where((nans == 0) & (tl.abs(best) < float("inf")), 0, EDITED_FAULT)
    scaled = tl.abs(tl.div_rn(best, tl.load(temps_ptr + row))) < float("inf")
    if EDITED or MASKED:
        raws = _tops(row, raws_ptr, chunks, CHUNKS)
        nans = tl.max((raws != raws).to(tl.int32), axis=0)
        raw = tl.where((nans == 0) & (tl.abs(tl.max(raws, axis=0)) < float("inf")), 0, LOGITS_FAULT)
        fault = tl.where(raw != 0, raw, scores)
    else:
        fault = tl.where(scores != 0, LOGITS_FAULT, 0)
    fault = tl.where((fault == 0) & (scaled == 0), EDITED_FAULT, fault)
    tl.store(faults_ptr + row, fault.to(tl.int64))
    if DRAWS:
        if (fault == 0) & (tl.load(greedy_ptr + row) == 0):
            cut, number = tl.minimum(ordered_bits(best), LOWEST_BITS), vocab
            ties = tl.full([CHUNKS], 0, tl.int32)
            k, p, m = _filters(row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab, TOP_K, TOP_P, MIN_P)
            if TOP_K or TOP_P:
                if (k < vocab) | (p < 1.0):
                    total = tl.sum(masses, axis=0)
                    low = ordered_bits(tl.load(state_ptr + row * STATE + LOW))
                    counts = tl.load(counts_ptr + row * CHUNKS + slot, mask=real, other=0)
                    above = tl.load(above_ptr + row * CHUNKS + slot, mask=real, other=0.0)
                    at = tl.arange(0, CHUNKS * CAP)
                    found_of = tl.load(counts_ptr + row * CHUNKS + at // CAP, mask=at // CAP < chunks, other=0)
                    held = at % CAP < found_of
                    y = tl.load(found_ptr + row * (CHUNKS * CAP) + at, mask=held, other=float("-inf"))
                    found, weights = ordered_bits(y), _weight(y, best, scale)
                    mass_above, mass_found = tl.sum(above, axis=0), tl.sum(weights, axis=0)
                    enough = tl.where(k < vocab, tl.sum(counts, axis=0) >= k, mass_above + mass_found >= p * total)
                    not_above = (k < vocab) | (mass_above < p * total)
                    if (tl.max(counts, axis=0) <= CAP) & not_above & (enough | (low == LOWEST_BITS)):
                        cut, number = _cut(
                            k, p, mass_above, total, low, found, weights, best, scale, row, source, chunks,
                            MASKED, EDITED, BIASED, TOP_K, TOP_P, BLOCK, False,
                        )  # fmt: skip
                        kept_mass = tl.reshape(tl.where(found > cut, weights, 0.0), [CHUNKS, CAP])
                        masses = above + tl.sum(kept_mass, axis=1)
                        ties = tl.sum(tl.reshape((found == cut).to(tl.int32), [CHUNKS, CAP]), axis=1)
                    else:
                        cut, number = _cut(
                            k, p, 0.0, total, cut, found, weights, best, scale, row, source, chunks,
                            MASKED, EDITED, BIASED, TOP_K, TOP_P, BLOCK, True,
                        )  # fmt: skip
                        masses, ties = _kept_of_row(
                            cut, best, scale, row, source, chunks, MASKED, EDITED, BIASED, CHUNKS, BLOCK
                        )
                    before = tl.cumsum(ties, axis=0) - ties
                    ties = tl.minimum(tl.maximum(number - before, 0), ties)
                    masses += ties.to(tl.float32) * _weight(ordered_float(cut), best, scale)
            floor = LOWEST_FLOAT
            if MIN_P:
                if m > 0.0:
                    floor = tl.load(state_ptr + row * STATE + FLOOR)
                    if ordered_float(cut) < floor:
                        masses = tl.load(floored_ptr + row * CHUNKS + slot, mask=real, other=0.0)
            ends = tl.cumsum(masses.to(tl.float64), axis=0)
            target = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)) * tl.max(ends, axis=0)
            # The last one of any mass where rounding puts the target at the end.
            last = tl.max(tl.where(masses > 0, slot, 0), axis=0)
            chunk = tl.min(tl.where((ends > target) & (masses > 0), slot, last), axis=0)
            start = tl.max(tl.where(slot < chunk, ends, 0.0), axis=0)
            kept_ties = tl.sum(tl.where(slot == chunk, ties, 0), axis=0)
            cols = chunk * BLOCK + tl.arange(0, BLOCK)
            _, y = _scores(row, cols, source, MASKED, EDITED, BIASED)
            bits = ordered_bits(y)
            kept = bits >= cut
            if TOP_K or TOP_P:
                if (k < vocab) | (p < 1.0):
                    tied = (bits == cut).to(tl.int32)
                    kept = (bits > cut) | ((tied != 0) & (tl.cumsum(tied, axis=0) <= kept_ties))
            w = tl.where(kept & (y >= floor), _weight(y, best, scale), 0.0)
            ends_here = tl.cumsum(w, axis=0)
            last = tl.max(tl.where(w > 0, cols, 0), axis=0)
            past = (ends_here > (target - start).to(tl.float32)) & (w > 0)
            drawn = tl.min(tl.where(past, cols, 0x7FFFFFFF), axis=0)
            drawn = tl.where(drawn < vocab, drawn, last)
            chosen = tl.where(tl.max(w, axis=0) > 0, drawn, chosen)
    tl.store(ids_ptr + row, chosen.to(tl.int64))
