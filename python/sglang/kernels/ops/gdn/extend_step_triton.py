"""Triton bodies of the chunked gated delta rule over packed sequences: convolution, chunks solved alone, scan of them.

Chunk c of the table ``chunks`` [NC, 2] int32 is rows ``index * CHUNK ..`` of sequence ``sequence``, whose packed rows
are ``bounds[sequence] : bounds[sequence + 1]``. All programs of a sequence that write its slot are in one launch, and
each writes only what it alone reads. Yang et al. 2024 (Gated Delta Networks), section 3.3.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.gdn.gates_triton import decay_of, unit_length


@triton.jit
def _chunk_rows(chunks_ptr, bounds_ptr, chunk, CHUNK: tl.constexpr):
    """Sequence, index in it, first packed row of the sequence and of the chunk, and the sequence's end."""
    sequence = tl.load(chunks_ptr + 2 * chunk)
    index = tl.load(chunks_ptr + 2 * chunk + 1)
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    end = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    return sequence, index, start, start + index * CHUNK, end


@triton.jit
def conv_heads_kernel(
    x_ptr, weight_ptr, columns_ptr, slots_ptr, bounds_ptr, chunks_ptr, out_ptr,
    x_stride, out_stride, columns_stride, key_heads,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """SiLU of the causal convolution; heads of queries and keys are scaled to unit length.

    grid (chunks * CHUNK / ROWS, query, key and value heads). The program of a sequence's first rows moves the slot's
    columns on.
    """
    PARTS: tl.constexpr = CHUNK // ROWS
    sequence, index, start, chunk_first, end = _chunk_rows(chunks_ptr, bounds_ptr, tl.program_id(0) // PARTS, CHUNK)
    first = chunk_first + (tl.program_id(0) % PARTS) * ROWS
    if first >= end:
        return
    is_first = first == start
    head = tl.program_id(1)
    is_key = head < 2 * key_heads
    channel = tl.where(is_key, head * K, 2 * key_heads * K + (head - 2 * key_heads) * V)
    lane = tl.arange(0, BLOCK_D)
    inside = lane < tl.where(is_key, K, V)
    weight_at = weight_ptr + channel * WIDTH + lane * WIDTH
    columns_base = columns_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * columns_stride + channel * (WIDTH - 1)
    columns_at = columns_base + lane * (WIDTH - 1)
    local = tl.arange(0, ROWS)
    # In-tile offsets are small and not negative; rows before the sequence are masked.
    x_base = x_ptr + (first - (WIDTH - 1)) * x_stride + channel
    before, left = (first - start).to(tl.int32), (end - first).to(tl.int32)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tap in tl.static_range(WIDTH):
        source = local + tap - (WIDTH - 1)
        mask = ((source >= -before) & (source < left))[:, None] & inside[None, :]
        x = tl.load(x_base + (local + tap)[:, None] * x_stride + lane[None, :], mask=mask, other=0.0)
        if tap < WIDTH - 1:
            if is_first:
                history = local + tap
                mask = (history < WIDTH - 1)[:, None] & inside[None, :]
                x += tl.load(columns_at[None, :] + history[:, None], mask=mask, other=0.0).to(x.dtype)
        weight = tl.load(weight_at + tap, mask=inside, other=0.0).to(tl.float32)
        total += x.to(tl.float32) * weight[None, :]
    dtype = out_ptr.dtype.element_ty
    out = (total / (1.0 + tl.exp(-total))).to(dtype)
    if is_key:
        out = unit_length(out, 1).to(dtype)
    out_at = out_ptr + first * out_stride + channel + local[:, None] * out_stride + lane[None, :]
    tl.store(out_at, out, mask=(local < left)[:, None] & inside[None, :])
    if is_first:
        taps = tl.arange(0, BLOCK_W)[None, :]
        last = end - (WIDTH - 1) + taps
        wanted = inside[:, None] & (taps < WIDTH - 1)
        new_at = x_ptr + channel + last * x_stride + lane[:, None]
        new = tl.load(new_at, mask=wanted & (last >= start), other=0.0)
        old_at = columns_at[:, None] + (last - start + WIDTH - 1)
        old = tl.load(old_at, mask=wanted & (last < start), other=0.0).to(new.dtype)
        kept = tl.where(last >= start, new, old).to(columns_ptr.dtype.element_ty)
        # Other threads of this program may still be reading the columns that are overwritten.
        tl.debug_barrier()
        tl.store(columns_at[:, None] + taps, kept, mask=wanted)


@triton.jit
def _unit_lower_inverse(
    A, scratch_ptr, CHUNK: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, PRECISION: tl.constexpr
):
    """``(I + A)^-1`` for strictly lower A [CHUNK, CHUNK] float32; CHUNK is at most 4 tiles.

    Forward substitution inside the diagonal tiles, all at once: one tile a warp, one column a lane of LANES, lines in
    registers. scratch [CHUNK, TILE + 1] float32 takes them there and back; its odd row stride keeps the compiler from
    widening the stores, which would spread a column over lanes and warps. With B the tiles' inverse, L the rest of A
    and N = B L the whole inverse is ``(I + N)^-1 B = (I - N)(I + N^2) B``, since N^4 = 0.
    """
    STRIDE: tl.constexpr = TILE + 1
    at = tl.arange(0, CHUNK)
    same = (at[:, None] // TILE) == (at[None, :] // TILE)
    tile_at = scratch_ptr + at[:, None] * STRIDE + (at % TILE)[None, :]
    tl.store(tile_at, A, mask=same)
    tl.debug_barrier()
    lane = tl.arange(0, LANES)[:, None, None]
    tile = tl.arange(0, CHUNK // TILE)[None, :, None]
    line = tl.arange(0, TILE)[None, None, :]
    line_at = scratch_ptr + (tile * TILE + line) * STRIDE
    inverse = tl.where((line == lane) & (tile >= 0), 1.0, 0.0)
    for step in tl.static_range(TILE - 1):
        solved = tl.sum(tl.where(line == step, inverse, 0.0), axis=2, keep_dims=True)
        inverse -= tl.load(line_at + step) * solved
    tl.debug_barrier()
    tl.store(line_at + lane, inverse, mask=(lane < TILE) & (line >= 0) & (tile >= 0))
    tl.debug_barrier()
    B = tl.load(tile_at, mask=same, other=0.0)
    N = tl.dot(B, tl.where(same, 0.0, A), input_precision=PRECISION)
    B += tl.dot(tl.dot(N, N, input_precision=PRECISION), B, input_precision=PRECISION)
    return B - tl.dot(N, B, input_precision=PRECISION)


@triton.jit
def solve_chunks_kernel(
    qkv_ptr, b_ptr, a_ptr, A_log_ptr, dt_bias_ptr, bounds_ptr, chunks_ptr,
    values_ptr, reads_ptr, scores_ptr, since_ptr, until_ptr, scratch_ptr,
    qkv_stride, b_stride, a_stride, key_heads, value_heads, per_key, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk knows without the state that enters it. grid (chunks, value heads).

    qkv [N, C] as ``conv_heads_kernel`` writes it -> per token and value head: values [V] to write if that state were
    zero, reads [K] (keys that read it), scores [CHUNK] (decayed, scaled query-key products), and in float32 the decay
    ``since`` the chunk's start and ``until`` its end. scratch [NC, HV, CHUNK, TILE + 1] float32 holds nothing after.
    """
    _, _, _, first, end = _chunk_rows(chunks_ptr, bounds_ptr, tl.program_id(0), CHUNK)
    head = tl.program_id(1)
    key_head = head // per_key
    local = tl.arange(0, CHUNK)
    live = local < (end - first).to(tl.int32)
    a = tl.load(a_ptr + first * a_stride + head + local * a_stride, mask=live, other=0.0)
    b = tl.load(b_ptr + first * b_stride + head + local * b_stride, mask=live, other=0.0).to(tl.float32)
    g = tl.where(live, decay_of(a, tl.load(A_log_ptr + head), tl.load(dt_bias_ptr + head)), 0.0)
    beta = tl.where(live, 1.0 / (1.0 + tl.exp(-b)), 0.0)
    # Sums in two parts, or strong decay early in a chunk blurs weak decay later: multiples of 1/16 add without error.
    g = tl.where(g < -1000.0, -1000.0, g)
    coarse = tl.floor(g * 16.0) * 0.0625
    fine = g - coarse
    coarse_sum, fine_sum = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    since = tl.exp(coarse_sum + fine_sum)
    until = tl.exp((tl.sum(coarse, 0) - coarse_sum) + (tl.sum(fine, 0) - fine_sum))
    token_head = first * value_heads + head
    tl.store(since_ptr + token_head + local * value_heads, since, mask=live)
    tl.store(until_ptr + token_head + local * value_heads, until, mask=live)

    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    qkv_base = qkv_ptr + first * qkv_stride
    key_tile = local[:, None] * qkv_stride + keys[None, :]
    in_key = live[:, None] & (keys < K)[None, :]
    in_value = live[:, None] & (values < V)[None, :]
    k = tl.load(qkv_base + (key_heads + key_head) * K + key_tile, mask=in_key, other=0.0)
    dtype = k.dtype
    between = (coarse_sum[:, None] - coarse_sum[None, :]) + (fine_sum[:, None] - fine_sum[None, :])
    # Masked before exp: above the diagonal the differences are positive and overflow.
    decay = tl.exp(tl.where(local[:, None] >= local[None, :], between, float("-inf")))
    q = tl.load(qkv_base + key_head * K + key_tile, mask=in_key, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * decay * scale
    scores_at = scores_ptr + token_head * CHUNK + local[:, None] * (value_heads * CHUNK) + local[None, :]
    tl.store(scores_at, scores.to(dtype), mask=live[:, None])

    A = tl.dot(k, tl.trans(k), input_precision="ieee") * decay * beta[:, None]
    A = tl.where(local[:, None] > local[None, :], A, 0.0)
    scratch_at = scratch_ptr + (tl.program_id(0).to(tl.int64) * value_heads + head) * (CHUNK * (TILE + 1))
    inverse = _unit_lower_inverse(A, scratch_at, CHUNK, TILE, LANES, PRECISION)
    inverse *= beta[None, :]
    reads = tl.dot((inverse * since[None, :]).to(dtype), k, input_precision="ieee")
    reads_at = reads_ptr + token_head * K + local[:, None] * (value_heads * K) + keys[None, :]
    tl.store(reads_at, reads.to(dtype), mask=in_key)
    v_at = qkv_base + 2 * key_heads * K + head * V + local[:, None] * qkv_stride + values[None, :]
    v = tl.load(v_at, mask=in_value, other=0.0)
    new_values = tl.dot(inverse.to(dtype), v, input_precision="ieee")
    values_at = values_ptr + token_head * V + local[:, None] * (value_heads * V) + values[None, :]
    tl.store(values_at, new_values.to(dtype), mask=in_value)


@triton.jit
def scan_chunks_kernel(
    qkv_ptr, values_ptr, reads_ptr, scores_ptr, since_ptr, until_ptr, state_ptr, slots_ptr, bounds_ptr, out_ptr,
    qkv_stride, state_stride, key_heads, value_heads, per_key, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Carry the state over a sequence's chunks and answer its queries. grid (blocks of V, value heads, sequences)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    key_head = head // per_key
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    end = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    keys, local = tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    state_at = state_ptr + slot * state_stride + head.to(tl.int64) * V * K + values[None, :] * K + keys[:, None]
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state = tl.load(state_at, mask=in_state, other=0.0).to(tl.float32)
    dtype = qkv_ptr.dtype.element_ty
    num_chunks = tl.cdiv(end - start, CHUNK).to(tl.int32)
    for chunk in range(num_chunks):
        first = start + chunk * CHUNK
        left = (end - first).to(tl.int32)
        live = local < left
        in_key = live[:, None] & (keys < K)[None, :]
        in_value = live[:, None] & (values < V)[None, :]
        token_head = first * value_heads + head
        value_tile = local[:, None] * (value_heads * V) + values[None, :]
        key_tile = local[:, None] * qkv_stride + keys[None, :]
        q_base = qkv_ptr + first * qkv_stride + key_head * K
        entering = state.to(dtype)
        reads_at = reads_ptr + token_head * K + local[:, None] * (value_heads * K) + keys[None, :]
        reads = tl.load(reads_at, mask=in_key, other=0.0)
        written = tl.load(values_ptr + token_head * V + value_tile, mask=in_value, other=0.0).to(tl.float32)
        written -= tl.dot(reads, entering, input_precision="ieee")
        q = tl.load(q_base + key_tile, mask=in_key, other=0.0)
        since = tl.load(since_ptr + token_head + local * value_heads, mask=live, other=0.0)
        out = tl.dot(q, entering, input_precision="ieee") * (since * scale)[:, None]
        scores_at = scores_ptr + token_head * CHUNK + local[:, None] * (value_heads * CHUNK) + local[None, :]
        scores = tl.load(scores_at, mask=live[:, None], other=0.0)
        out = tl.dot(scores, written.to(dtype), out, input_precision="ieee")
        tl.store(out_ptr + token_head * V + value_tile, out.to(dtype), mask=in_value)
        k = tl.load(q_base + key_heads * K + key_tile, mask=in_key, other=0.0)
        until = tl.load(until_ptr + token_head + local * value_heads, mask=live, other=0.0)
        decay = tl.load(since_ptr + token_head + (tl.minimum(left, CHUNK) - 1) * value_heads)
        state = tl.dot(tl.trans(k), (written * until[:, None]).to(dtype), state * decay, input_precision="ieee")
    # A small state is held by several threads, each of which must have read it before one of them overwrites it.
    tl.debug_barrier()
    tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=in_state)
