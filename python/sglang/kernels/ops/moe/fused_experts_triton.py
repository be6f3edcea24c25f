"""Triton bodies of the routed experts: one token, few tokens and many tokens, and the ordering that the last needs.

A *pair* is one (token, chosen expert) entry of the routing table, numbered ``token * top_k + j``. Weights are
[E, rows, K] with K dense. Nothing is summed atomically, so equal inputs give equal bits.

With FP8 rows carry a scale a group of 128 columns, x_scale [rows, K / 128] of any strides (of one token: dense), and
weights one a block of 128x128, w_scale [E, rows / 128, K / 128]; tiles of columns then lie inside one block, and a step
of K is one group.
"""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.activation.silu_and_mul_triton import clamp_above, clamp_both
from sglang.kernels.ops.quant.scales_triton import GROUP, quantize


@triton.jit
def _silu_and_mul(gate, up, dtype, LIMIT: tl.constexpr):
    """As the unfused ops round: both products, then the SiLU, then the result."""
    wide = clamp_above(gate.to(dtype).to(tl.float32), LIMIT, dtype)
    silu = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    return (silu * clamp_both(up.to(dtype).to(tl.float32), LIMIT, dtype)).to(dtype)


# --- one token: memory alone counts, so no matrix unit -----------------------------------------------------------


@triton.jit
def scaled_row(x, scale, BLOCK_K: tl.constexpr):
    """x [BLOCK_K] times a scale for each group of 128; a scale is read once, not once for each column."""
    scaled = tl.reshape(x, [BLOCK_K // GROUP, GROUP]) * scale[:, None]
    return tl.reshape(scaled, [BLOCK_K])


@triton.jit
def one_token_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, ids_ptr, out_ptr, width, k_dim, expert_stride, row_stride, tiles,
    GATE_UP: tl.constexpr, FP8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LIMIT: tl.constexpr = None,
):  # fmt: skip
    """out [pairs, width]: BLOCK_N columns of one pair a program; for GATE_UP activated, of the token's row, else of the
    pair's row."""
    wait_for_kernel_ahead()
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if expert >= 0:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = (tl.minimum(n, width - 1) * row_stride)[:, None]
        up_rows = width * row_stride
        groups = k_dim // GROUP
        row = 0 if GATE_UP else pair
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if FP8:
            row_block = expert * (1 + GATE_UP) * (width // GROUP) + tile * BLOCK_N // GROUP
            block = w_scale_ptr + row_block * groups
        for start in range(0, k_dim, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < k_dim
            x = tl.load(x_ptr + row * k_dim + k, mask=inside, other=0.0).to(tl.float32)
            x_up = x
            if FP8:
                group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
                known = group < groups
                scale = tl.load(x_scale_ptr + row * groups + group, mask=known, other=0.0)
                if GATE_UP:
                    of_up = tl.load(block + width // GROUP * groups + group, mask=known, other=0.0)
                    x_up = scaled_row(x, scale * of_up, BLOCK_K)
                x = scaled_row(x, scale * tl.load(block + group, mask=known, other=0.0), BLOCK_K)
            at = w_ptr + expert * expert_stride + rows + k[None, :]
            acc += tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32) * x[None, :]
            if GATE_UP:
                up += tl.load(at + up_rows, mask=inside[None, :], other=0.0).to(tl.float32) * x_up[None, :]
        dtype = out_ptr.dtype.element_ty
        if GATE_UP:
            out = _silu_and_mul(tl.sum(acc, axis=1), tl.sum(up, axis=1), dtype, LIMIT)
        else:
            out = tl.sum(acc, axis=1).to(dtype)
        tl.store(out_ptr + pair.to(tl.int64) * width + n, out, mask=n < width)


@triton.jit
def one_token_down_kernel(
    x_ptr, w_ptr, ids_ptr, weights_ptr, out_ptr, pairs, width, k_dim, expert_stride, row_stride,
    PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [width]: all pairs of BLOCK_N columns at once, their rows [pairs, k_dim] times w2, weighted and summed."""
    wait_for_kernel_ahead()
    pair = tl.arange(0, PAIRS)
    expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int64)
    taken = expert >= 0
    weight = tl.load(weights_ptr + pair, mask=taken, other=0.0)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, width - 1) * row_stride
    acc = tl.zeros([PAIRS, BLOCK_N, BLOCK_K], tl.float32)
    base = (tl.where(taken, expert, 0) * expert_stride)[:, None, None] + rows[None, :, None]
    for start in range(0, k_dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = taken[:, None] & (k < k_dim)[None, :]
        x = tl.load(x_ptr + pair[:, None] * k_dim + k[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + base + k[None, None, :], mask=mask[:, None, :], other=0.0)
        acc += w.to(tl.float32) * x[:, None, :]
    product = tl.sum(acc, axis=2).to(out_ptr.dtype.element_ty).to(tl.float32)
    total = tl.sum(product * weight[:, None], axis=0)
    tl.store(out_ptr + n, total.to(out_ptr.dtype.element_ty), mask=n < width)


# --- tiles: BLOCK_M pairs of one expert times BLOCK_N of its weight rows -----------------------------------------


@triton.jit
def expert_tile(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, members, valid, expert, tile,
    width, k_dim, x_stride, x_scale_stride, x_scale_step, expert_stride, row_stride,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LIMIT: tl.constexpr = None,
    TWO: tl.constexpr = False, out_scale_ptr=None, LARGEST: tl.constexpr = None, ROWS: tl.constexpr = None,
):  # fmt: skip
    """Rows of x are tokens for GATE_UP (member // TOP_K), pairs for the down product; out rows are always pairs.

    With LARGEST a tile of GATE_UP is one group: its rows, rounded to ROWS, are quantised into out and out_scale [pairs,
    width / 128].

    With TWO a tile of the down product is two runs of BLOCK_N columns that share the rows of x; width is then a
    multiple of both runs. Two sums of 128 columns fit the registers where one of 256 and its partial sum do not.
    """
    tl.static_assert(not FP8 or GROUP % BLOCK_N == 0, "a tile of 8-bit weights lies inside one block")
    tl.static_assert(LARGEST is None or (GATE_UP and BLOCK_N == GROUP), "a tile of quantised rows is one group")
    first = tile * BLOCK_N * (1 + TWO)
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read a real one instead of being masked: the store drops them.
    source = (members // TOP_K if GATE_UP else members).to(tl.int64)
    x_at = x_ptr + (source * x_stride)[:, None] + k[None, :]
    column = tl.minimum(n, width - 1)
    w_at = w_ptr + tl.cast(expert, tl.int64) * expert_stride + (column * row_stride)[None, :] + k[:, None]
    # The second sum's weight rows: those of the up projection, or the next run of columns.
    apart = width if GATE_UP else BLOCK_N
    groups = k_dim // GROUP
    if FP8:
        x_scale_at = x_scale_ptr + source * x_scale_stride
        row_blocks = width // GROUP * (1 + GATE_UP)
        w_scale_at = w_scale_ptr + (tl.cast(expert, tl.int64) * row_blocks + first // GROUP) * groups
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = k < k_dim - start
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        if FP8:
            # A tile lies inside one block of weights, so its scale is one number. Triton 3.6 compiles no pointer to one
            # number for AMD that a loop moves, nor one to the scales of rows of one group.
            step_scale_at = w_scale_at + start // BLOCK_K
            x_scale = tl.load(x_scale_at + start // BLOCK_K * x_scale_step)
            acc += tl.dot(x, w) * (x_scale * tl.load(step_scale_at))[:, None]
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATE_UP or TWO:
            if EVEN_K:
                w_2 = tl.load(w_at + apart * row_stride)
            else:
                w_2 = tl.load(w_at + apart * row_stride, mask=(k < k_dim - start)[:, None], other=0.0)
            if FP8:
                acc_2 += tl.dot(x, w_2) * (x_scale * tl.load(step_scale_at + apart // GROUP * groups))[:, None]
            else:
                acc_2 = tl.dot(x, w_2, acc_2, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    dtype = out_ptr.dtype.element_ty if ROWS is None else ROWS
    out = _silu_and_mul(acc, acc_2, dtype, LIMIT) if GATE_UP else acc.to(dtype)
    if LARGEST is not None:
        q, scale = quantize(out.to(tl.float32), LARGEST)
        out = q.to(out_ptr.dtype.element_ty)
        scale_at = members.to(tl.int64) * (width // GROUP) + tile
        tl.store(out_scale_ptr + scale_at, scale, mask=valid)
    mask = valid[:, None] & (n < width)[None, :]
    at = out_ptr + members.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(at, out, mask=mask)
    if TWO:
        tl.store(at + BLOCK_N, acc_2.to(dtype), mask=mask)


@triton.jit
def block_members(pair, same, before, BLOCK_M: tl.constexpr):
    """Of the pairs that are ``same``, those from the ``before``-th on: their numbers [BLOCK_M], and which there are."""
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
    slot = before + tl.arange(0, BLOCK_M)
    here = same[:, None] & (rank[:, None] == slot[None, :])
    return tl.sum(tl.where(here, pair[:, None], 0), axis=0), slot < tl.sum(same.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["pairs"])
def few_tokens_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, ids_ptr, out_ptr,
    pairs, width, k_dim, x_stride, x_scale_stride, x_scale_step, expert_stride, row_stride, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, FP8: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LIMIT: tl.constexpr = None,
):  # fmt: skip
    """No ordering beforehand: every BLOCK_M-th pair of an expert gathers those up to the next (pairs <= PAIRS)."""
    wait_for_kernel_ahead()
    first, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert = tl.load(ids_ptr + first)
    pair = tl.arange(0, PAIRS)
    same = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert
    before = tl.sum((same & (pair < first)).to(tl.int32), axis=0)
    # A loop over the blocks of an expert would keep two programs from a multiprocessor: its registers.
    if (expert >= 0) & (before % BLOCK_M == 0):
        members, valid = block_members(pair, same, before, BLOCK_M)
        expert_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, members, valid, expert, tile,
            width, k_dim, x_stride, x_scale_stride, x_scale_step, expert_stride, row_stride,
            TOP_K, GATE_UP, EVEN_K, FP8, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "max_blocks"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def many_tokens_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, order_ptr, block_expert_ptr, num_blocks_ptr, out_ptr,
    pairs, width, k_dim, x_stride, x_scale_stride, x_scale_step, expert_stride, row_stride, max_blocks, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    LIMIT: tl.constexpr = None, TWO: tl.constexpr = False, out_scale_ptr=None, LARGEST: tl.constexpr = None,
    ROWS: tl.constexpr = None,
):  # fmt: skip
    """One block of ordered pairs times one tile of columns; programs past the last block leave."""
    wait_for_kernel_ahead()
    # GROUP_M blocks go through all tiles together, so that weights and rows meet again in the cache.
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles
    first = pid // in_group * GROUP_M
    size = tl.minimum(max_blocks - first, GROUP_M)
    block, tile = first + (pid % in_group) % size, (pid % in_group) // size
    if block < tl.load(num_blocks_ptr):
        expert = tl.load(block_expert_ptr + block)
        order = tl.load(order_ptr + block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
        valid = order < pairs
        expert_tile(
            x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, tl.where(valid, order, 0), valid, expert, tile,
            width, k_dim, x_stride, x_scale_stride, x_scale_step, expert_stride, row_stride,
            TOP_K, GATE_UP, EVEN_K, FP8, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT, TWO,
            out_scale_ptr, LARGEST, ROWS,
        )  # fmt: skip


# --- ordering: pairs by expert, stable, each expert's run padded to whole blocks ----------------------------------


@triton.jit(do_not_specialize=["pairs"])
def count_pairs_kernel(ids_ptr, counts_ptr, pairs, CHUNK: tl.constexpr):
    """counts [E]: how many pairs chose expert ``program_id``."""
    wait_for_kernel_ahead()
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    hits = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pairs, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < pairs, other=-1)
        hits += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(hits, axis=0))


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def place_pairs_kernel(
    ids_ptr, counts_ptr, order_ptr, block_expert_ptr, num_blocks_ptr, pairs, num_experts,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Expert ``program_id`` writes its pairs in order, ``pairs`` into the padding, and itself into its blocks."""
    wait_for_kernel_ahead()
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + other, mask=other < num_experts, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(other < expert, blocks, 0), axis=0)
    own_blocks = tl.sum(tl.where(other == expert, blocks, 0), axis=0)
    own_pairs = tl.sum(tl.where(other == expert, counts, 0), axis=0)
    if expert == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))
        # A counter for kernels that draw their tiles.
        tl.store(num_blocks_ptr + 1, 0)
    lane = tl.arange(0, CHUNK)
    for start in range(0, own_blocks, CHUNK):
        tl.store(block_expert_ptr + first_block + start + lane, expert, mask=start + lane < own_blocks)
    run = order_ptr + first_block.to(tl.int64) * BLOCK_M
    padding = own_pairs + tl.arange(0, BLOCK_M)
    tl.store(run + padding, pairs, mask=padding < own_blocks * BLOCK_M)
    seen = 0
    for start in range(0, pairs, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < pairs, other=-1)
        hit = (ids == expert).to(tl.int32)
        tl.store(run + seen + tl.cumsum(hit, axis=0) - 1, start + lane, mask=hit != 0)
        seen += tl.sum(hit, axis=0)


@triton.jit
def weighted_sum_kernel(
    rows_ptr, ids_ptr, weights_ptr, out_ptr, width, tiles, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """out [N, width]: a token's TOP_K rows, weighted, summed in order in float32; skipped pairs are never read."""
    wait_for_kernel_ahead()
    token, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        taken = tl.load(ids_ptr + pair) >= 0
        weight = tl.load(weights_ptr + pair)
        readable = cols < tl.where(taken, width, 0)
        row = tl.load(rows_ptr + pair * width + cols, mask=readable, other=0.0).to(tl.float32)
        total += tl.where(taken, weight * row, 0.0)
    tl.store(out_ptr + token * width + cols, total.to(out_ptr.dtype.element_ty), mask=cols < width)
