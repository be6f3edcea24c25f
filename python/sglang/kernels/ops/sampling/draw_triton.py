"""The next token of each row in two launches, four with a filter; no launch sorts the vocabulary.

``scan_kernel`` reads each chunk of each row once: its best score, its mass and every STRIDE-th score. From those
``bracket_kernel`` estimates between which two scores the filter cuts the row; ``sift_kernel`` reads the rows again
and keeps the few scores between them; ``pick_kernel`` finds the exact cut there, the chunk that the draw falls into,
and the id in it. Where the estimate was wrong or the kept scores do not fit, it searches the row itself: slower, but
the same cut.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.sampling.scores_triton import (
    _chunk_masses,
    _filters,
    _scale,
    _scores,
    _sum_2,
    _sum_3,
    _sum_4,
    _tops,
    _weight,
    ordered_bits,
    ordered_float,
)

# Standard deviations that an estimate may be off.
DEVIATIONS = tl.constexpr(5.0)
# Below the best score by this much a weight is 0 in float32.
DEPTH = tl.constexpr(110.0)
BISECTIONS = tl.constexpr(14)
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


@triton.jit(do_not_specialize=["chunks", "words", "edits", "biased"])
def scan_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, edits, biased, chunks,
    tops_ptr, firsts_ptr, raws_ptr, sums_ptr, samples_ptr,
    EDITED: tl.constexpr, FILTER: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its best score and where it is first, the best raw logit, the mass, the sample."""
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words, edits, biased)  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    lane = tl.arange(0, BLOCK)
    cols = chunk * BLOCK + lane
    inside = cols < vocab
    raw, y = _scores(row, cols, source, EDITED)
    top = tl.max(y, axis=0)
    at = row * CHUNKS + chunk
    tl.store(tops_ptr + at, top)
    tl.store(firsts_ptr + at, tl.min(tl.where((y == top) & inside, cols, 0x7FFFFFFF), axis=0))
    # A row with NaN has a sum of NaN, whatever a maximum makes of it.
    tl.store(sums_ptr + at, tl.sum(_weight(y, top, _scale(row, temps_ptr)), axis=0))
    if EDITED:
        nans = tl.max((raw != raw).to(tl.int32), axis=0)
        tl.store(raws_ptr + at, tl.where(nans > 0, float("nan"), tl.max(raw, axis=0)))
    if FILTER:
        # Of the scores that a thread holds side by side one alone may be of the sample.
        for _ in tl.static_range(HALVINGS):
            y, _ = tl.split(tl.reshape(y, [y.shape[0] // 2, 2]))
        own = tl.arange(0, BLOCK >> HALVINGS)
        sampled = own % (STRIDE >> HALVINGS) == 0
        tl.store(samples_ptr + at * (BLOCK // STRIDE) + own // (STRIDE >> HALVINGS), y, mask=sampled)


@triton.jit
def _error(mid, squares, best, scale):
    """How far the row's mass below ``mid`` may be from what the sample, weights of these squares, says."""
    return DEVIATIONS * tl.sqrt(squares) + _weight(mid, best, scale)


@triton.jit
def _bracket_top_p(spare, deepest, y, w, best, scale):
    """The highest score below which there is surely no more mass than ``spare``, the lowest with surely as much."""
    low_yes, low_no, high_no, high_yes = deepest, best, deepest, best
    step, together = 0, True
    # Until the two part, one look at the sample serves both.
    while (step < BISECTIONS) & together:
        mid = (low_yes + low_no) * 0.5
        below = tl.where(y < mid, w, 0.0)
        mass, squares = _sum_2(below, below * below)
        error = _error(mid, squares, best, scale)
        less, more = mass + error <= spare, mass - error >= spare
        low_yes, low_no = tl.where(less, mid, low_yes), tl.where(less, low_no, mid)
        high_yes, high_no = tl.where(more, mid, high_yes), tl.where(more, high_no, mid)
        together = less != more
        step += 1
    while step < BISECTIONS:
        low_mid, high_mid = (low_yes + low_no) * 0.5, (high_yes + high_no) * 0.5
        low_below, high_below = tl.where(y < low_mid, w, 0.0), tl.where(y < high_mid, w, 0.0)
        low_mass, low_squares, high_mass, high_squares = _sum_4(
            low_below, low_below * low_below, high_below, high_below * high_below
        )
        less = low_mass + _error(low_mid, low_squares, best, scale) <= spare
        more = high_mass - _error(high_mid, high_squares, best, scale) >= spare
        low_yes, low_no = tl.where(less, low_mid, low_yes), tl.where(less, low_no, low_mid)
        high_yes, high_no = tl.where(more, high_mid, high_yes), tl.where(more, high_no, high_mid)
        step += 1
    return low_yes, high_yes


@triton.jit
def _bracket_top_k(k, deepest, y, best, STRIDE: tl.constexpr):
    """The highest score from which on there are surely as many as ``k``."""
    share = k.to(tl.float32) / STRIDE
    needed = share + DEVIATIONS * tl.sqrt(share) + DEVIATIONS
    yes, no = deepest, best
    for _ in range(BISECTIONS):
        mid = (yes + no) * 0.5
        enough = tl.sum((y >= mid).to(tl.float32), axis=0) >= needed
        yes, no = tl.where(enough, mid, yes), tl.where(enough, no, mid)
    return yes


@triton.jit(do_not_specialize=["chunks"])
def bracket_kernel(
    temps_ptr, tops_ptr, sums_ptr, samples_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, greedy_ptr, state_ptr,
    vocab, chunks,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores LOW <= HIGH between which the cut of a row lies, very likely, and the score FLOOR of its min-p.

    A sample of one score in STRIDE tells the mass below a score, and how far off that may be; from below, as the few
    large weights of a row are what a sample misses. WHOLE: all scores fit, and none is ruled out.
    """
    row = tl.program_id(0).to(tl.int64)
    tops = _tops(row, tops_ptr, chunks, CHUNKS)
    best, scale = tl.max(tops, axis=0), _scale(row, temps_ptr)
    k, p, m = _filters(row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab)
    drawn = tl.load(greedy_ptr + row) == 0
    cuts = drawn & ((k < vocab) | (p < 1.0))
    low = tl.where(cuts, LOWEST_FLOAT, float("inf"))
    high = tl.where(cuts, float("inf"), float("inf"))
    if cuts & (not WHOLE):
        lane = tl.arange(0, CHUNKS * BLOCK // STRIDE)
        held = lane < chunks * (BLOCK // STRIDE)
        y = tl.load(samples_ptr + row * (CHUNKS * BLOCK // STRIDE) + lane, mask=held, other=float("-inf"))
        deepest = best - DEPTH * tl.load(temps_ptr + row)
        low_yes, high_yes = deepest, best
        if k < vocab:
            low_yes = _bracket_top_k(k, deepest, y, best, STRIDE)
        else:
            masses = _chunk_masses(row, tops, best, scale, sums_ptr, chunks, CHUNKS)
            spare = (1.0 - p) * tl.sum(masses, axis=0) / STRIDE
            low_yes, high_yes = _bracket_top_p(spare, deepest, y, _weight(y, best, scale), best, scale)
        low = tl.where(low_yes > deepest, low_yes, LOWEST_FLOAT)
        high = tl.where(high_yes < best, high_yes, float("inf"))
    tl.store(state_ptr + row * STATE + LOW, low)
    tl.store(state_ptr + row * STATE + HIGH, high)
    tl.store(
        state_ptr + row * STATE + FLOOR,
        tl.where(drawn & (m > 0.0), best + tl.log(m) * tl.load(temps_ptr + row), LOWEST_FLOAT),
    )
    tl.store(state_ptr + row * STATE + BEST, best)


@triton.jit(do_not_specialize=["chunks", "words", "edits", "biased"])
def sift_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, edits, biased, chunks,
    tops_ptr, state_ptr, found_ptr, counts_ptr, above_ptr, floored_ptr,
    EDITED: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its scores from LOW to HIGH, the mass above HIGH, the mass from FLOOR on.

    The scores are kept if there is room for all, those that one of LANES reads behind those of the lane before.
    """
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words, edits, biased)  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    at = row * CHUNKS + chunk
    low, high = tl.load(state_ptr + row * STATE + LOW), tl.load(state_ptr + row * STATE + HIGH)
    floor = tl.load(state_ptr + row * STATE + FLOOR)
    least = tl.where(floor > LOWEST_FLOAT, tl.minimum(low, floor), low)
    if least < float("inf"):
        number, above, floored = 0, 0.0, 0.0
        if tl.load(tops_ptr + at) >= least:
            # Read score by score, as what is kept is written: else pointers and scores change lanes in between.
            cols = tl.max_contiguous(chunk * BLOCK + tl.arange(0, BLOCK), 1)
            _, y = _scores(row, cols, source, EDITED)
            w = tl.exp2((y - tl.load(state_ptr + row * STATE + BEST)) * _scale(row, temps_ptr))
            between = ((y >= low) & (y <= high)).to(tl.int32)
            kept, above = _sum_2(between.to(tl.float32), tl.where(y > high, w, 0.0))
            number = kept.to(tl.int32)
            floored = tl.sum(tl.where(y >= floor, w, 0.0), axis=0)
            if (number > 0) & (number <= CAP):
                # What one lane holds it sums in its registers: one running sum alone is over lanes.
                held = tl.reshape(between, [BLOCK // LANES, LANES])
                of_lane = tl.sum(held, axis=0)
                first = tl.cumsum(of_lane, axis=0) - of_lane
                place = tl.reshape(first[None, :] + tl.cumsum(held, axis=0) - held, [BLOCK])
                tl.store((found_ptr + at * CAP) + place, y, mask=between != 0)
        tl.store(counts_ptr + at, number)
        tl.store(above_ptr + at, above)
        tl.store(floored_ptr + at, floored)


@triton.jit
def _from(
    cut_1, cut_2, cut_3, found, weights, best, scale, row, source, chunks,
    EDITED: tl.constexpr, BLOCK: tl.constexpr, RESCUE: tl.constexpr,
    COUNT_THEM: tl.constexpr,
):  # fmt: skip
    """Mass, or number, of scores from each of three cuts on (``ordered_bits``): of those found, or of the row."""
    cut_1, cut_2, cut_3 = cut_1.to(tl.int32), cut_2.to(tl.int32), cut_3.to(tl.int32)
    if RESCUE:
        part_1 = tl.zeros([BLOCK], tl.float32)
        part_2, part_3 = part_1, part_1
        for chunk in range(chunks):
            _, y = _scores(row, chunk * BLOCK + tl.arange(0, BLOCK), source, EDITED)
            bits, w = ordered_bits(y), _weight(y, best, scale)
            if COUNT_THEM:
                w = tl.where(y == float("-inf"), 0.0, 1.0)
            part_1 += tl.where(bits >= cut_1, w, 0.0)
            part_2 += tl.where(bits >= cut_2, w, 0.0)
            part_3 += tl.where(bits >= cut_3, w, 0.0)
    else:
        w = weights
        if COUNT_THEM:
            w = tl.full(found.shape, 1.0, tl.float32)
        part_1 = tl.where(found >= cut_1, w, 0.0)
        part_2 = tl.where(found >= cut_2, w, 0.0)
        part_3 = tl.where(found >= cut_3, w, 0.0)
    return _sum_3(part_1, part_2, part_3)


@triton.jit
def _search(
    yes, no, goal, found, weights, best, scale, row, source, chunks,
    EDITED: tl.constexpr, BLOCK: tl.constexpr, RESCUE: tl.constexpr,
    COUNT_THEM: tl.constexpr,
):  # fmt: skip
    """The last cut in [yes, no) from which on mass or number reach ``goal``; int64, a quarter of the way at a time."""
    while no - yes > 1:
        quarter = tl.maximum((no - yes) >> 2, 1)
        mid_1, mid_2, mid_3 = yes + quarter, yes + ((no - yes) >> 1), no - quarter
        sum_1, sum_2, sum_3 = _from(
            mid_1, mid_2, mid_3, found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, COUNT_THEM,
        )  # fmt: skip
        yes = tl.where(sum_3 >= goal, mid_3, tl.where(sum_2 >= goal, mid_2, tl.where(sum_1 >= goal, mid_1, yes)))
        # What is not enough by any comparison is too far, so that the interval shrinks whatever the sums are.
        up_to_3 = tl.where(sum_3 >= goal, no, mid_3)
        no = tl.where(sum_1 >= goal, tl.where(sum_2 >= goal, up_to_3, mid_2), mid_1)
    return yes


@triton.jit
def _cut(
    k, p, above, total, lowest, highest, found, weights, best, scale, row, source, chunks,
    EDITED: tl.constexpr, BLOCK: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """The lowest kept score as ``ordered_bits`` and how many of its ties are kept, by top-k and then by top-p.

    ``above`` is the mass above the scores found, ``lowest`` and ``highest`` are bounds.
    """
    vocab = source[8]
    yes, number = lowest.to(tl.int64), vocab
    no = highest.to(tl.int64) + 1
    if k < vocab:
        yes = _search(
            yes, no, k.to(tl.float32), found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, True,
        )  # fmt: skip
        past = yes + 1
        count, _, _ = _from(
            past, past, past, found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, True,
        )  # fmt: skip
        mass, _, _ = _from(
            past, past, past, found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, False,
        )  # fmt: skip
        number = k - count.to(tl.int32)
        weight = _weight(ordered_float(yes.to(tl.int32)), best, scale)
        # At the bound there may be no score, or fewer than k: its weight is that of nothing, or of nothing much.
        total = mass + tl.where(yes > lowest, number.to(tl.float32) * weight, 0.0)
    if p < 1.0:
        goal, start = p * total - above, yes
        yes = _search(
            yes, no, goal, found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, False,
        )  # fmt: skip
        past = yes + 1
        mass, _, _ = _from(
            past, past, past, found, weights, best, scale, row, source, chunks,
            EDITED, BLOCK, RESCUE, False,
        )  # fmt: skip
        weight = _weight(ordered_float(yes.to(tl.int32)), best, scale)
        ties = tl.ceil((goal - mass) / tl.maximum(weight, 1e-38))
        ties = tl.minimum(tl.maximum(ties, 1.0), 1e9).to(tl.int32)
        number = tl.where(yes > start, ties, tl.minimum(ties, number))
    return yes.to(tl.int32), number


@triton.jit
def _kept_of_row(
    cut, best, scale, row, source, chunks,
    EDITED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By chunk, read from the row: the mass above ``cut`` and the number of its ties."""
    slot = tl.arange(0, CHUNKS)
    masses, ties = tl.zeros([CHUNKS], tl.float32), tl.zeros([CHUNKS], tl.int32)
    for chunk in range(chunks):
        _, y = _scores(row, chunk * BLOCK + tl.arange(0, BLOCK), source, EDITED)
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


@triton.jit(do_not_specialize=["chunks", "words", "edits", "biased"])
def pick_kernel(
    logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
    vocab, row_stride, words, edits, biased, chunks,
    top_ks_ptr, top_ps_ptr, min_ps_ptr, greedy_ptr, seeds_ptr, positions_ptr,
    tops_ptr, firsts_ptr, raws_ptr, sums_ptr, state_ptr, found_ptr, counts_ptr, above_ptr, floored_ptr,
    ids_ptr, faults_ptr,
    EDITED: tl.constexpr,
    DRAWS: tl.constexpr, FILTER: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row: where its filter cuts, the chunk that its draw falls into, and the id there."""
    source = (logits_ptr, temps_ptr, allowed_ptr, edit_rows_ptr, marks_ptr, penalties_ptr, left_ptr, bias_ptr,
              vocab, row_stride, words, edits, biased)  # fmt: skip
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
    if EDITED:
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
            k, p, m = _filters(row, top_ks_ptr, top_ps_ptr, min_ps_ptr, vocab)
            if FILTER:
                if (k < vocab) | (p < 1.0):
                    total = tl.sum(masses, axis=0)
                    low = ordered_bits(tl.load(state_ptr + row * STATE + LOW))
                    high = ordered_bits(tl.minimum(tl.load(state_ptr + row * STATE + HIGH), best))
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
                            k, p, mass_above, total, low, high, found, weights, best, scale, row, source, chunks,
                            EDITED, BLOCK, False,
                        )  # fmt: skip
                        kept_mass = tl.reshape(tl.where(found > cut, weights, 0.0), [CHUNKS, CAP])
                        masses = above + tl.sum(kept_mass, axis=1)
                        ties = tl.sum(tl.reshape((found == cut).to(tl.int32), [CHUNKS, CAP]), axis=1)
                    else:
                        cut, number = _cut(
                            k, p, 0.0, total, cut, ordered_bits(best), found, weights, best, scale, row, source, chunks,
                            EDITED, BLOCK, True,
                        )  # fmt: skip
                        masses, ties = _kept_of_row(cut, best, scale, row, source, chunks, EDITED, CHUNKS, BLOCK)
                    before = tl.cumsum(ties, axis=0) - ties
                    ties = tl.minimum(tl.maximum(number - before, 0), ties)
                    masses += ties.to(tl.float32) * _weight(ordered_float(cut), best, scale)
            floor = LOWEST_FLOAT
            if FILTER:
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
            _, y = _scores(row, cols, source, EDITED)
            bits = ordered_bits(y)
            kept = bits >= cut
            if FILTER:
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
