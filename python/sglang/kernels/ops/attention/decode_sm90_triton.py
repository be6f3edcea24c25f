"""Attention of one query of many heads per request over latent rows, for NVIDIA GPUs of sm_90 in Gluon.

One program takes 64 heads of a query over a span of its tokens, 64 tokens at a time. Four warps fetch the rows of the
table's slots by asynchronous copies, of which the first 512 columns are key and value and 64 more are key alone. Two
groups of four warps compute the logits of 32 tokens each, tell one another their maxima and weights through shared
memory, and sum half of the value's columns each. Parts and their lse are those of ``decode_kernel`` in
``decode_triton``, up to the order of sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sglang.kernels.ops.sm90_triton import copy_rows, join_warps

LOG2E, LN2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
# Heads of a program; tokens of a slot, whose logits one group of warps computes; columns of a tile of 128 bytes;
# tiles of a key and of its value; slots.
HEADS, TOKENS, TILE = gl.constexpr(64), gl.constexpr(32), gl.constexpr(64)
KEY_TILES, VALUE_TILES, SLOTS = gl.constexpr(9), gl.constexpr(8), gl.constexpr(4)


@gluon.jit
def _span(lens_ptr, splits):
    """Tokens [start, end) of this program; whole blocks of 64, except a context's last."""
    seq_len = gl.load(lens_ptr + gl.program_id(1)).to(gl.int32)
    length = gl.cdiv(gl.cdiv(seq_len, splits), 2 * TOKENS) * (2 * TOKENS)
    start = gl.program_id(2) * length
    return start, gl.minimum(start + length, seq_len)


@gluon.jit
def _fetch(
    q_bufs, k_bufs, q_full, full, empty, q_ptr, k_ptr, table_ptr, rows_ptr, lens_ptr,
    splits, q_stride, q_head_stride, k_stride, table_stride,
):  # fmt: skip
    """Fill the tiles of the query, then the slots with rows of 32 tokens, two slots for each 64."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, layout))
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    start, end = _span(lens_ptr, splits)
    if start < end:
        q_at = q_ptr + gl.program_id(1).to(gl.int64) * q_stride + (head * q_head_stride)[:, None] + column[None, :]
        for tile in gl.static_range(KEY_TILES):
            copy_rows(q_bufs.index(tile), q_at + tile * TILE)
        async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)
        table = table_ptr + gl.load(rows_ptr + gl.program_id(1)) * table_stride
        rows = gl.load(table + gl.minimum(start + lane, end - 1))
        step = 0
        for first in range(start, start + gl.cdiv(end - start, 2 * TOKENS) * (2 * TOKENS), TOKENS):
            # The next slots of the table are read before this step waits.
            ahead = gl.load(table + gl.minimum(first + TOKENS + lane, end - 1))
            k_at = k_ptr + (rows.to(gl.int64) * k_stride)[:, None] + column[None, :]
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
            for tile in gl.static_range(KEY_TILES):
                copy_rows(k_bufs.index(slot * KEY_TILES + tile), k_at + tile * TILE)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            rows = ahead
            step += 1


@gluon.jit
def _tell(place, value, barrier):
    """Store a number per row for the other group of warps."""
    place.store(value)
    join_warps()
    mbarrier.arrive(barrier)


@gluon.jit
def _store(acc, total, out_ptr, at, column, layout: gl.constexpr):
    columns = column + gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + at[:, None] + columns[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty))


@gluon.jit
def _attend(
    q_bufs, k_bufs, p_bufs, stats, q_full, full, empty, told, p_full, lens_ptr, out_ptr, lse_ptr,
    scale, num_heads, splits, WHOLE: gl.constexpr, dtype: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The PART-th 32 of each 64 tokens' logits, and the PART-th 256 columns of the value."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, products)
    by_sum: gl.constexpr = gl.SliceLayout(1, sums)
    start, end = _span(lens_ptr, splits)
    head = gl.program_id(0) * HEADS + gl.arange(0, HEADS, layout=by_sum)
    out_row = (gl.program_id(1).to(gl.int64) * splits + gl.program_id(2)) * num_heads + head
    first_tile = PART * (VALUE_TILES // 2)
    acc_0 = gl.zeros([HEADS, TILE], gl.float32, sums)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0
    total = gl.full([HEADS], 0.0, gl.float32, by_row)
    maximum = gl.full([HEADS], float("-inf"), gl.float32, by_row)
    if start < end:
        scale2 = scale * LOG2E
        nothing = gl.zeros([HEADS, TOKENS], gl.float32, products)
        mbarrier.wait(q_full.index(0), 0)
        step = 0
        for first in range(start, end, 2 * TOKENS):
            slot = step % 2 * 2
            phase = step // 2 & 1
            keys = (slot + PART) * KEY_TILES
            mbarrier.wait(full.index(slot + PART), phase)
            logits = warpgroup_mma(
                q_bufs.index(0), k_bufs.index(keys).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            for tile in gl.static_range(1, KEY_TILES):
                k = k_bufs.index(keys + tile).permute((1, 0))
                logits = warpgroup_mma(q_bufs.index(tile), k, logits, is_async=True)
            logits = warpgroup_mma_wait(0, deps=[logits])
            tokens = first + PART * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, products))
            logits = gl.where((tokens < end)[None, :], logits, float("-inf"))
            highest = gl.maximum(maximum, gl.max(logits, axis=1))
            _tell(stats.index(PART), highest, told.index(0))
            mbarrier.wait(told.index(0), step & 1)
            # At least one of the 64 tokens is inside, so that only a row of NaN has a maximum of -inf.
            highest = gl.maximum(highest, stats.index(1 - PART).load(by_row))
            keep = gl.exp2((maximum - highest) * scale2)
            probs = gl.exp2(logits * scale2 - (highest * scale2)[:, None])
            total = total * keep + gl.sum(probs, axis=1)
            maximum = highest
            p_bufs.index(PART).store(probs.to(dtype))
            fence_async_shared()
            join_warps()
            mbarrier.arrive(p_full.index(0))
            kept = gl.convert_layout(keep, by_sum)[:, None]
            acc_0 = acc_0 * kept
            acc_1 = acc_1 * kept
            acc_2 = acc_2 * kept
            acc_3 = acc_3 * kept
            mbarrier.wait(p_full.index(0), step & 1)
            # Its weights come later than its keys; a group waits itself for all that it reads even so.
            mbarrier.wait(full.index(slot + 1 - PART), phase)
            for block in gl.static_range(2):
                p = p_bufs.index(block)
                v = (slot + block) * KEY_TILES + first_tile
                acc_0 = warpgroup_mma(p, k_bufs.index(v), acc_0, is_async=True)
                acc_1 = warpgroup_mma(p, k_bufs.index(v + 1), acc_1, is_async=True)
                acc_2 = warpgroup_mma(p, k_bufs.index(v + 2), acc_2, is_async=True)
                acc_3 = warpgroup_mma(p, k_bufs.index(v + 3), acc_3, is_async=True)
            acc_0, acc_1, acc_2, acc_3 = warpgroup_mma_wait(0, deps=[acc_0, acc_1, acc_2, acc_3])
            join_warps()
            mbarrier.arrive(empty.index(slot))
            mbarrier.arrive(empty.index(slot + 1))
            step += 1
        _tell(stats.index(PART), total, told.index(0))
        mbarrier.wait(told.index(0), step & 1)
        total += stats.index(1 - PART).load(by_row)
    else:
        total += 1.0
    if not WHOLE:
        if PART == 0:
            # -inf where the span is empty: such a part is not read.
            gl.store(lse_ptr + out_row, gl.convert_layout(maximum * scale + gl.log2(total) * LN2, by_sum))
    if WHOLE or start < end:
        at = out_row * (VALUE_TILES * TILE)
        mass = gl.convert_layout(total, by_sum)
        _store(acc_0, mass, out_ptr, at, first_tile * TILE, sums)
        _store(acc_1, mass, out_ptr, at, (first_tile + 1) * TILE, sums)
        _store(acc_2, mass, out_ptr, at, (first_tile + 2) * TILE, sums)
        _store(acc_3, mass, out_ptr, at, (first_tile + 3) * TILE, sums)


@gluon.jit(do_not_specialize=["splits"])
def decode_heads_sm90_kernel(
    q_ptr, k_ptr, table_ptr, rows_ptr, lens_ptr, out_ptr, lse_ptr,
    scale, num_heads, splits, q_stride, q_head_stride, k_stride, table_stride, WHOLE: gl.constexpr,
):  # fmt: skip
    """grid (blocks of 64 heads, requests, splits); q [B, H, 576], k [S, 576], parts [B, splits, H, 512] or out."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    q_bufs = gl.allocate_shared_memory(dtype, [KEY_TILES, HEADS, TILE], rows)
    k_bufs = gl.allocate_shared_memory(dtype, [SLOTS * KEY_TILES, TOKENS, TILE], rows)
    p_bufs = gl.allocate_shared_memory(dtype, [2, HEADS, TOKENS], weights)
    stats = gl.allocate_shared_memory(gl.float32, [2, HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    # Each of the 128 threads that copy rows, and both groups that multiply.
    mbarrier.init(q_full.index(0), count=128)
    mbarrier.init(told.index(0), count=2)
    mbarrier.init(p_full.index(0), count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=128)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                q_bufs, k_bufs, p_bufs, stats, q_full, full, empty, told, p_full, lens_ptr, out_ptr, lse_ptr,
                scale, num_heads, splits, WHOLE, dtype, 0,
            )),
            (_attend, (
                q_bufs, k_bufs, p_bufs, stats, q_full, full, empty, told, p_full, lens_ptr, out_ptr, lse_ptr,
                scale, num_heads, splits, WHOLE, dtype, 1,
            )),
            (_fetch, (
                q_bufs, k_bufs, q_full, full, empty, q_ptr, k_ptr, table_ptr, rows_ptr, lens_ptr,
                splits, q_stride, q_head_stride, k_stride, table_stride,
            )),
        ],
        [4, 4], [232, 40],
    )  # fmt: skip
