"""The products of few pairs per expert in MXFP4 for NVIDIA GPUs of sm_90 in Gluon: codes from the layout of
``place_codes`` straight to the registers of a product.

A program of ROWS / 16 warps goes through all columns with two runs of ROWS weight rows: gate and up, or two of the down
product. Steps of 128 columns wait in shared memory, STAGES - 1 of them on their way. Each thread fetches by itself the
codes that it multiplies. The products are those of warps (m16n8k16): groups of warps would wait for each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from sglang.kernels.ops.moe.fused_experts_mxfp4_triton import LIFT, PLACED_NUMBERS, PLACED_WHOLE, TWICE
from sglang.kernels.ops.sm90_triton import copy_rows

# Columns of a step, 32-bit words of a row's codes in it, and what splits a word.
STEP, WORDS = gl.constexpr(128), gl.constexpr(16)
SPLIT = gl.constexpr("mov.b32 {$0, $1}, $2;")
# With the layout below the two of a register are of one group.
NUMBERS = gl.constexpr(PLACED_NUMBERS.value.replace("prmt.b32 power, $5, $6, 0x5410;", "mov.b32 power, $5;"))


@gluon.constexpr_function
def _rows_of_warps(rows, registers, lanes, shape):
    """The layout of ``shape`` whose warps have 16 of ``rows`` rows each, the first dimension."""
    warps = [[16 << i, *[0] * (len(shape) - 1)] for i in range((rows // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.jit
def _halves(words):
    """int32 [..., n] -> int16 [..., n, 2], the lower bits first."""
    low, high = gl.inline_asm_elementwise(SPLIT, "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)
    return gl.join(low, high)


@gluon.jit
def _numbers(quads, power):
    """int16 of four placed codes and what TWICE and LIFT make of scales -> four bfloat16, 8 columns apart."""
    return gl.inline_asm_elementwise(
        NUMBERS, "=r,=r,=r,=r,r,r,r", [quads, power], is_pure=True, pack=2,
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
    )  # fmt: skip


@gluon.jit
def _add_product(acc, words, scales, x, ROWS: gl.constexpr, QUADS: gl.constexpr, SUMS: gl.constexpr):
    """acc [ROWS, M] + codes [ROWS, 16] with scales [ROWS] int32, a byte per 32 columns, times x [128, M]."""
    groups: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, QUADS))
    # [ROWS, threads of a row, groups of 32 columns, halves of a word]
    quads = gl.convert_layout(_halves(words).reshape([ROWS, 4, 4, 2]), QUADS, assert_trivial=True)
    group = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, groups)), 0)
    power = ((gl.expand_dims(scales, 1) >> (group * 8)) & 255) * TWICE + LIFT
    power, quads = gl.broadcast(gl.expand_dims(gl.expand_dims(power, 1), 3), quads)
    first, second, third, fourth = _numbers(quads, power)
    numbers = gl.join(gl.join(first, third), gl.join(second, fourth))
    numbers = gl.permute(numbers, (0, 2, 4, 5, 1, 3)).reshape([ROWS, STEP])
    numbers = gl.convert_layout(numbers, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    return mma_v2(numbers, x, acc)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _members(same, pair, before, pairs, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """Of the pairs that are ``same``, BLOCK_M from the ``before``-th on; ``pairs`` where there are fewer."""
    square: gl.constexpr = gl.BlockedLayout([1, BLOCK_M], [32, 1], [WARPS, 1], [1, 0])
    rank = gl.where(same > 0, gl.associative_scan(same, 0, _add) - 1 - before, -1)
    rank = gl.convert_layout(rank, gl.SliceLayout(1, square))[:, None]
    pair = gl.convert_layout(pair, gl.SliceLayout(1, square))[:, None]
    here = rank == gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, square))[None, :]
    return gl.min(gl.where(here, pair, pairs), axis=0)


@gluon.jit
def _copy(bufs, at, valid, k, slot):
    """Begin to fetch the k-th step into a slot: rows of x, codes and scales of both runs."""
    copy_rows(bufs[0].index(slot), at[0] + k * STEP, mask=valid)
    copy_rows(bufs[1].index(slot), at[1] + k * (64 * WORDS))
    copy_rows(bufs[2].index(slot), at[2] + k * (64 * WORDS))
    copy_rows(bufs[3].index(slot), at[3] + k * 64)
    copy_rows(bufs[4].index(slot), at[4] + k * 64)


@gluon.jit
def _clamp(values, zero, LIMIT: gl.constexpr, dtype: gl.constexpr):
    """values float32, at most LIMIT rounded to ``dtype``; NaN stays."""
    if LIMIT is not None:
        bound = (zero + LIMIT).to(dtype).to(gl.float32)
        values = gl.where(values > bound, bound, values)
    return values


@gluon.jit
def _tile(
    x_ptr, w_ptr, w_scale_ptr, out_ptr, members, expert, tile, pairs, width, k_dim, x_stride,
    TOP_K: gl.constexpr, GATE_UP: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    LIMIT: gl.constexpr,
):  # fmt: skip
    """As ``mxfp4_tile`` with ``pairs`` among the members in the place of none, and two runs of ROWS weight rows."""
    warps: gl.constexpr = ROWS // 16
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    codes: gl.constexpr = _rows_of_warps(
        ROWS, [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [ROWS, WORDS]
    )
    quads: gl.constexpr = _rows_of_warps(
        ROWS, [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 2, 0], [8, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]], [ROWS, 4, 4, 2],
    )  # fmt: skip
    scales: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, quads)))
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    bufs = (
        gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_M, STEP], swizzled),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, WORDS], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, WORDS], plain),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat),
    )
    steps = k_dim // STEP
    first = tile * (ROWS * (2 - GATE_UP))
    row = expert.to(gl.int64) * (width * (1 + GATE_UP)) + first
    row_2 = row + (width if GATE_UP else ROWS)
    in_granule = gl.arange(0, ROWS, layout=gl.SliceLayout(1, codes))[:, None] * WORDS
    in_granule = in_granule + gl.arange(0, WORDS, layout=gl.SliceLayout(0, codes))[None, :]
    lane = gl.arange(0, ROWS, layout=line)
    w_ptr = w_ptr.to(gl.pointer_type(gl.int32))
    w_scale_ptr = w_scale_ptr.to(gl.pointer_type(gl.int32))
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, rows))
    source = gl.convert_layout(members, gl.SliceLayout(1, rows))
    valid = (source < pairs)[:, None]
    source = gl.where(source < pairs, source // TOP_K if GATE_UP else source, 0).to(gl.int64)
    at = (
        x_ptr + (source * x_stride)[:, None] + column[None, :],
        w_ptr + (row // 64 * steps * 64 + row % 64) * WORDS + in_granule,
        w_ptr + (row_2 // 64 * steps * 64 + row_2 % 64) * WORDS + in_granule,
        w_scale_ptr + (row // 64 * steps * 64 + row % 64) + lane,
        w_scale_ptr + (row_2 // 64 * steps * 64 + row_2 % 64) + lane,
    )
    for k in gl.static_range(STAGES - 1):
        if k < steps:
            _copy(bufs, at, valid, k, k)
        async_copy.commit_group()
    zero = gl.zeros([ROWS, BLOCK_M], gl.float32, sums)
    acc, acc_2 = zero, zero
    slot, free = 0, STAGES - 1
    for k in range(steps):
        async_copy.wait_group(STAGES - 2)
        x = bufs[0].index(slot).permute((1, 0)).load(gl.DotOperandLayout(1, sums, 2))
        w, w_2 = bufs[1].index(slot).load(codes), bufs[2].index(slot).load(codes)
        scale, scale_2 = bufs[3].index(slot).load(scales), bufs[4].index(slot).load(scales)
        if k + STAGES - 1 < steps:
            _copy(bufs, at, valid, k + STAGES - 1, free)
        async_copy.commit_group()
        acc = _add_product(acc, w, scale, x, ROWS, quads, sums)
        acc_2 = _add_product(acc_2, w_2, scale_2, x, ROWS, quads, sums)
        free = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    acc, acc_2 = acc * PLACED_WHOLE, acc_2 * PLACED_WHOLE
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    member = gl.convert_layout(members, gl.SliceLayout(0, sums))
    there = (member < pairs)[None, :]
    n = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums))
    out_at = out_ptr + (member.to(gl.int64) * width)[None, :] + n[:, None]
    if GATE_UP:
        gate = _clamp(acc.to(dtype).to(gl.float32), zero, LIMIT, dtype)
        silu = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
        up = -_clamp(-_clamp(acc_2.to(dtype).to(gl.float32), zero, LIMIT, dtype), zero, LIMIT, dtype)
        gl.store(out_at, (silu * up).to(dtype), mask=there)
    else:
        gl.store(out_at, acc.to(dtype), mask=there)
        gl.store(out_at + ROWS, acc_2.to(dtype), mask=there)


@gluon.jit(do_not_specialize=["pairs", "max_blocks"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def few_pairs_mxfp4_kernel(
    x_ptr, w_ptr, w_scale_ptr, ids_ptr, block_expert_ptr, num_blocks_ptr, out_ptr,
    pairs, width, k_dim, x_stride, max_blocks, tiles,
    TOP_K: gl.constexpr, GATE_UP: gl.constexpr, HELD: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, LIMIT: gl.constexpr = None,
):  # fmt: skip
    """As ``few_tokens_mxfp4_kernel``, whose PAIRS is HELD; with HELD 0 as ``many_tokens_mxfp4_kernel``, and ids_ptr is
    the order of pairs."""
    warps: gl.constexpr = ROWS // 16
    line: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    if HELD > 0:
        first, tile = gl.program_id(0) // tiles, gl.program_id(0) % tiles
        expert = gl.load(ids_ptr + first)
        pair = gl.arange(0, HELD, layout=line)
        same = (gl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert).to(gl.int32)
        before = gl.sum(same * (pair < first).to(gl.int32), axis=0)
        begins = (expert >= 0) & (before % BLOCK_M == 0)
    else:
        block, tile = gl.program_id(0) % max_blocks, gl.program_id(0) // max_blocks
        begins = block < gl.load(num_blocks_ptr)
    if begins:
        if HELD > 0:
            members = _members(same, pair, before, pairs, BLOCK_M, warps)
        else:
            expert = gl.load(block_expert_ptr + block)
            members = gl.load(ids_ptr + block * BLOCK_M + gl.arange(0, BLOCK_M, layout=line))
        _tile(
            x_ptr, w_ptr, w_scale_ptr, out_ptr, members, expert, tile, pairs, width, k_dim, x_stride,
            TOP_K, GATE_UP, BLOCK_M, ROWS, STAGES, LIMIT,
        )  # fmt: skip
