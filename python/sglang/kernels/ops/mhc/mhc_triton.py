"""Two Triton bodies for all of mHC's ways in and out: one over slices of columns, one over whole rows."""

import triton
import triton.language as tl


@triton.jit
def _way_out_of(post_ptr, comb_ptr, rows, live, k: tl.constexpr):
    """What stream k takes of the row, and of streams 0 to 3."""
    comb_at = comb_ptr + rows * 16 + k
    post = tl.load(post_ptr + rows * 4 + k, mask=live, other=0.0)
    c0, c1 = tl.load(comb_at, mask=live, other=0.0), tl.load(comb_at + 4, mask=live, other=0.0)
    c2, c3 = tl.load(comb_at + 8, mask=live, other=0.0), tl.load(comb_at + 12, mask=live, other=0.0)
    return post[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None]


@triton.jit
def _add_product(total, x, w):
    """total + x w^T: x [R, D], w [M, D] float32. Beside bfloat16 rows w is the sum of two bfloat16 numbers."""
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        low = (w - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(x, tl.trans(high), tl.dot(x, tl.trans(low), total))
    return tl.dot(x.to(tl.float32), tl.trans(w), total, input_precision="ieee")


@triton.jit
def _matrix_of(fn_ptr, width, mixes, cols, inside, k: tl.constexpr, MIXES: tl.constexpr):
    """What of fn meets these columns of stream k."""
    at = fn_ptr + (mixes[:, None] * 4 + k) * width + cols[None, :]
    return tl.load(at, mask=(mixes < MIXES)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _all_streams(base_ptr, rows, row_stride, stream_stride, cols, live, inside):
    """All four streams at these columns, of a row or of a row of fn, side by side: [R, 4 D]."""
    k = tl.arange(0, 4)
    at = base_ptr + rows[:, None, None] * row_stride + k[None, :, None] * stream_stride + cols[None, None, :]
    streams = tl.load(at, mask=live[:, None, None] & inside[None, None, :], other=0.0)
    return tl.reshape(streams, [rows.shape[0], 4 * cols.shape[0]])


@triton.jit
def _with_stream(products, squares, stream, w):
    wide = stream.to(tl.float32)
    return _add_product(products, stream, w), squares + tl.sum(wide * wide, axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def mix_streams_kernel(
    row_ptr, x_ptr, post_ptr, comb_ptr, fn_ptr, out_ptr, products_ptr, squares_ptr,
    num_rows, width, row_stride, x_stride, x_stream_stride,
    POST: tl.constexpr, PRE: tl.constexpr, READ_BACK: tl.constexpr, AT_ONCE: tl.constexpr,
    MIXES: tl.constexpr, MIX_BLOCK: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of four streams, STEPS blocks of their columns: with POST leave a sub-block, with PRE enter one.

    POST writes the streams that ``hc_post`` gives; else they are x. PRE writes the slice's part of ``fn x`` [MIXES] and
    of the sum of squares, of the streams as they were rounded; with AT_ONCE all four streams in one product.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    mixes = tl.arange(0, MIX_BLOCK)
    products = tl.zeros((BLOCK_R, MIX_BLOCK), dtype=tl.float32)
    squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    if POST:
        ways_out = (
            _way_out_of(post_ptr, comb_ptr, rows, live, 0), _way_out_of(post_ptr, comb_ptr, rows, live, 1),
            _way_out_of(post_ptr, comb_ptr, rows, live, 2), _way_out_of(post_ptr, comb_ptr, rows, live, 3),
        )  # fmt: skip
    for step in range(STEPS):
        cols = (tl.program_id(1) * STEPS + step) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = cols < width
        mask = live[:, None] & inside[None, :]
        x_at = x_ptr + rows[:, None] * x_stride + cols[None, :]
        if POST:
            row = tl.load(row_ptr + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            x0 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
            x1 = tl.load(x_at + x_stream_stride, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x_at + 2 * x_stream_stride, mask=mask, other=0.0).to(tl.float32)
            x3 = tl.load(x_at + 3 * x_stream_stride, mask=mask, other=0.0).to(tl.float32)
        if AT_ONCE:
            # Behind all other loads that the new streams need: its change of layout waits for it.
            w = _all_streams(fn_ptr, mixes, 4 * width, width, cols, mixes < MIXES, inside)
        for k in tl.static_range(4):
            if POST:
                post, c0, c1, c2, c3 = ways_out[k]
                stream = (post * row + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3).to(x_ptr.dtype.element_ty)
                tl.store(out_ptr + (rows[:, None] * 4 + k) * width + cols[None, :], stream, mask=mask)
            elif not AT_ONCE:
                stream = tl.load(x_at + k * x_stream_stride, mask=mask, other=0.0)
            if PRE and not READ_BACK and not AT_ONCE:
                w = _matrix_of(fn_ptr, width, mixes, cols, inside, k, MIXES)
                products, squares = _with_stream(products, squares, stream, w)
        if READ_BACK:
            # Kept for the product, the new streams would be computed twice: for it and for memory lanes differ.
            tl.debug_barrier()
            if not AT_ONCE:
                for k in tl.static_range(4):
                    stream = tl.load(out_ptr + (rows[:, None] * 4 + k) * width + cols[None, :], mask=mask, other=0.0)
                    w = _matrix_of(fn_ptr, width, mixes, cols, inside, k, MIXES)
                    products, squares = _with_stream(products, squares, stream, w)
        if AT_ONCE:
            if POST:
                streams = _all_streams(out_ptr, rows, 4 * width, width, cols, live, inside)
            else:
                streams = _all_streams(x_ptr, rows, x_stride, x_stream_stride, cols, live, inside)
            products, squares = _with_stream(products, squares, streams, w)
    if PRE:
        part = tl.program_id(1).to(tl.int64) * num_rows + rows
        tl.store(squares_ptr + part, squares, mask=live)
        kept = live[:, None] & (mixes < MIXES)[None, :]
        tl.store(products_ptr + part[:, None] * MIXES + mixes[None, :], products, mask=kept)


@triton.jit
def _inverse_rms(squares, width, rms_eps):
    return tl.rsqrt(tl.sum(squares, axis=0) / (4 * width) + rms_eps)


@triton.jit
def _summing_to_one(a, b, c, d, eps):
    """Four numbers over their sum, which eps raises."""
    # One instruction and a product, where a division is many.
    root = tl.rsqrt((a + b) + (c + d) + eps)
    scale = root * root
    return a * scale, b * scale, c * scale, d * scale


@triton.jit
def _column(matrix, columns, i: tl.constexpr):
    return tl.sum(tl.where(columns[None, :] == i, matrix, 0.0), axis=1)


@triton.jit
def _softmax_of_four(matrix, columns, i: tl.constexpr, eps):
    """The softmax of a row's numbers i to i + 3, raised by eps."""
    a, b = _column(matrix, columns, i), _column(matrix, columns, i + 1)
    c, d = _column(matrix, columns, i + 2), _column(matrix, columns, i + 3)
    most = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = _summing_to_one(tl.exp(a - most), tl.exp(b - most), tl.exp(c - most), tl.exp(d - most), 0.0)
    return a + eps, b + eps, c + eps, d + eps


@triton.jit
def _store_four(at, live, a, b, c, d):
    tl.store(at, a, mask=live)
    tl.store(at + 1, b, mask=live)
    tl.store(at + 2, c, mask=live)
    tl.store(at + 3, d, mask=live)


@triton.jit
def _coefficients_of_the_way_out(
    group, products_ptr, squares_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr,
    num_rows, width, splits, rms_eps, hc_eps,
    ITERATIONS: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """post and comb of TOKENS rows."""
    rows = group.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    kept = rows < num_rows
    # Eight parts at once: the lanes of one warp then hold all of a row, and no sum crosses warps.
    eight, four, sixteen = tl.arange(0, 8), tl.arange(0, 4), tl.arange(0, 16)
    squares = tl.zeros((TOKENS, 8), dtype=tl.float32)
    post = tl.zeros((TOKENS, 8, 4), dtype=tl.float32)
    logits = tl.zeros((TOKENS, 8, 16), dtype=tl.float32)
    for first in tl.static_range(0, SPLITS, 8):
        split = first + eight
        part = split.to(tl.int64)[None, :] * num_rows + rows[:, None]
        live = kept[:, None] & (split < splits)[None, :]
        squares += tl.load(squares_ptr + part, mask=live, other=0.0)
        at = products_ptr + part[:, :, None] * 24
        post += tl.load(at + 4 + four[None, None, :], mask=live[:, :, None], other=0.0)
        logits += tl.load(at + 8 + sixteen[None, None, :], mask=live[:, :, None], other=0.0)
    inverse = tl.rsqrt(tl.sum(squares, axis=1) / (4 * width) + rms_eps)[:, None]
    post = tl.sum(post, axis=1) * inverse * tl.load(scale_ptr + 1) + tl.load(base_ptr + 4 + four)[None, :]
    tl.store(post_ptr + rows[:, None] * 4 + four[None, :], 2.0 / (1.0 + tl.exp(-post)), mask=kept[:, None])
    logits = tl.sum(logits, axis=1) * inverse * tl.load(scale_ptr + 2) + tl.load(base_ptr + 8 + sixteen)[None, :]
    # Sixteen vectors of rows: the balancing, a chain of forty sums, then needs no other lane.
    a0, a1, a2, a3 = _softmax_of_four(logits, sixteen, 0, hc_eps)
    b0, b1, b2, b3 = _softmax_of_four(logits, sixteen, 4, hc_eps)
    c0, c1, c2, c3 = _softmax_of_four(logits, sixteen, 8, hc_eps)
    d0, d1, d2, d3 = _softmax_of_four(logits, sixteen, 12, hc_eps)
    a0, b0, c0, d0 = _summing_to_one(a0, b0, c0, d0, hc_eps)
    a1, b1, c1, d1 = _summing_to_one(a1, b1, c1, d1, hc_eps)
    a2, b2, c2, d2 = _summing_to_one(a2, b2, c2, d2, hc_eps)
    a3, b3, c3, d3 = _summing_to_one(a3, b3, c3, d3, hc_eps)
    for _ in range(ITERATIONS - 1):
        a0, a1, a2, a3 = _summing_to_one(a0, a1, a2, a3, hc_eps)
        b0, b1, b2, b3 = _summing_to_one(b0, b1, b2, b3, hc_eps)
        c0, c1, c2, c3 = _summing_to_one(c0, c1, c2, c3, hc_eps)
        d0, d1, d2, d3 = _summing_to_one(d0, d1, d2, d3, hc_eps)
        a0, b0, c0, d0 = _summing_to_one(a0, b0, c0, d0, hc_eps)
        a1, b1, c1, d1 = _summing_to_one(a1, b1, c1, d1, hc_eps)
        a2, b2, c2, d2 = _summing_to_one(a2, b2, c2, d2, hc_eps)
        a3, b3, c3, d3 = _summing_to_one(a3, b3, c3, d3, hc_eps)
    at = comb_ptr + rows * 16
    _store_four(at, kept, a0, a1, a2, a3)
    _store_four(at + 4, kept, b0, b1, b2, b3)
    _store_four(at + 8, kept, c0, c1, c2, c3)
    _store_four(at + 12, kept, d0, d1, d2, d3)


@triton.jit(do_not_specialize=["num_rows", "groups"])
def join_streams_kernel(
    products_ptr, squares_ptr, base_ptr, scale_ptr, x_ptr, weight_ptr, row_ptr, post_ptr, comb_ptr,
    num_rows, groups, width, splits, x_stride, x_stream_stride, rms_eps, hc_eps, norm_eps,
    MIXES: tl.constexpr, ITERATIONS: tl.constexpr, NORM: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first ``groups`` programs sum the parts of TOKENS rows each to post and comb; the others join a row each.

    A row is ``sum_j pre[j] x[j]``, rounded, and normed behind that with NORM.
    """
    program = tl.program_id(0)
    if MIXES > 4:
        if program < groups:
            _coefficients_of_the_way_out(
                program, products_ptr, squares_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr,
                num_rows, width, splits, rms_eps, hc_eps, ITERATIONS, SPLITS, TOKENS,
            )  # fmt: skip
            return
    row = (program - groups).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    x_at = x_ptr + row * x_stride + cols
    x0 = tl.load(x_at, mask=mask, other=0.0)
    x1 = tl.load(x_at + x_stream_stride, mask=mask, other=0.0)
    x2 = tl.load(x_at + 2 * x_stream_stride, mask=mask, other=0.0)
    x3 = tl.load(x_at + 3 * x_stream_stride, mask=mask, other=0.0)
    split, four = tl.arange(0, SPLITS), tl.arange(0, 4)
    part = split.to(tl.int64) * num_rows + row
    inverse = _inverse_rms(tl.load(squares_ptr + part, mask=split < splits, other=0.0), width, rms_eps)
    pre = tl.load(products_ptr + part[:, None] * MIXES + four[None, :], mask=(split < splits)[:, None], other=0.0)
    pre = tl.sum(pre, axis=0) * inverse * tl.load(scale_ptr) + tl.load(base_ptr + four)
    pre = 1.0 / (1.0 + tl.exp(-pre)) + hc_eps
    out = tl.sum(tl.where(four == 0, pre, 0.0), axis=0) * x0.to(tl.float32)
    out += tl.sum(tl.where(four == 1, pre, 0.0), axis=0) * x1.to(tl.float32)
    out += tl.sum(tl.where(four == 2, pre, 0.0), axis=0) * x2.to(tl.float32)
    out += tl.sum(tl.where(four == 3, pre, 0.0), axis=0) * x3.to(tl.float32)
    rounded = out.to(x_ptr.dtype.element_ty)
    if NORM:
        wide = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + norm_eps)
        rounded = (wide * scale * tl.load(weight_ptr + cols, mask=mask, other=0.0)).to(x_ptr.dtype.element_ty)
    tl.store(row_ptr + row * width + cols, rounded, mask=mask)
