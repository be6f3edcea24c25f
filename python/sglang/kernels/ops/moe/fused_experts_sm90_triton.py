"""The products of many tokens' experts for NVIDIA GPUs of sm_90 in Gluon: warps that load, warps that multiply.

One program per multiprocessor takes the next tile of 128 pairs times twice 128 columns, in steps of 128 bytes of K: 128
columns of 8 bits, with scales, or 64 of bfloat16, without. A group of four warps fetches, weights by the tensor memory
accelerator and gathered rows by asynchronous copies, and two groups of four warps multiply 64 rows each, so that one
scales or stores its sums while the other keeps the matrix units busy. 64 rows without a pair cost nothing. Sums, their
order over K, scales and rounding are those of ``expert_tile`` in ``fused_experts_triton``.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang.kernels.ops.quant.scales_triton import LEAST
from sglang.kernels.ops.sm90_triton import copy_rows, copy_tile

# Rows of a tile, rows that one group of warps multiplies, and columns of one of its two sums or of a group of scales.
ROWS, HALF, GROUP = gl.constexpr(128), gl.constexpr(64), gl.constexpr(128)
NUMBER_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# By bytes of a weight.
WEIGHTS_LAYOUTS = {size: gl.NVMMASharedLayout(128, element_bitwidth=8 * size, rank=2) for size in (1, 2)}


def weight_tiles(w):
    """w [E, rows, K] contiguous, K whole steps of 128 bytes -> the kernel's ``w_desc``; a launch takes it by value."""
    return TensorDescriptor.from_tensor(w.flatten(0, 1), [128, 128 // w.itemsize], WEIGHTS_LAYOUTS[w.itemsize])


@gluon.jit
def _place(pid, num_blocks, tiles, group):
    """Block and tile of a number: ``group`` blocks go through all tiles together."""
    in_group = group * tiles
    first = pid // in_group * group
    size = gl.minimum(num_blocks - first, group)
    return first + (pid % in_group) % size, (pid % in_group) // size


@gluon.jit
def _announce(numbers, empty, step, number, STAGES: gl.constexpr):
    """Write the number of the tile that begins in a slot, when the slot is free."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    numbers.index(slot).store(gl.full([1], number, gl.int32, NUMBER_LAYOUT))


@gluon.jit
def _announced(numbers, full, step, STAGES: gl.constexpr):
    """The number of the tile that begins in a slot, when the slot is full."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    return gl.max(numbers.index(slot).load(NUMBER_LAYOUT), axis=0)


@gluon.jit
def _fetch(
    x_bufs, w_bufs, numbers, full, empty, x_ptr, w_desc, order_ptr, block_expert_ptr, num_blocks_ptr,
    pairs, width, k_dim, x_stride, tiles, group,
    TOP_K: gl.constexpr, GATE_UP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the slots with steps of K: rows of x, and two runs of 128 weight rows."""
    STEP: gl.constexpr = w_desc.block_shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, STEP // 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, layout))
    num_blocks = gl.load(num_blocks_ptr)
    number = gl.program_id(0)
    step = 0
    while number < num_blocks * tiles:
        _announce(numbers, empty, step, number, STAGES)
        block, tile = _place(number, num_blocks, tiles, group)
        # Tiles of 64 rows are done sooner, so programs take tiles in turn. The last to draw sets the counter back.
        drawn = gl.atomic_add(num_blocks_ptr + 1, 1, sem="relaxed")
        if drawn == num_blocks * tiles - 1:
            gl.store(num_blocks_ptr + 1, 0)
        number = drawn + gl.num_programs(0)
        run = order_ptr + block * ROWS
        order = gl.load(run + lane)
        order_2 = gl.load(run + HALF + lane)
        is_tall = gl.load(run + HALF) < pairs
        valid, valid_2 = order < pairs, order_2 < pairs
        source = order // TOP_K if GATE_UP else order
        source_2 = order_2 // TOP_K if GATE_UP else order_2
        x_at = x_ptr + (source.to(gl.int64) * x_stride)[:, None] + column[None, :]
        x_at_2 = x_ptr + (source_2.to(gl.int64) * x_stride)[:, None] + column[None, :]
        row = gl.load(block_expert_ptr + block) * (width * (1 + GATE_UP)) + tile * (GROUP * (2 - GATE_UP))
        apart = width if GATE_UP else GROUP
        for k in range(0, k_dim, STEP):
            slot = step % STAGES
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, 2 * GROUP * 128)
            copy_tile(w_desc, [row, k], ready, w_bufs.index(slot).slice(0, GROUP))
            copy_tile(w_desc, [row + apart, k], ready, w_bufs.index(slot).slice(GROUP, GROUP))
            copy_rows(x_bufs.index(2 * slot), x_at + k, mask=valid[:, None])
            if is_tall:
                copy_rows(x_bufs.index(2 * slot + 1), x_at_2 + k, mask=valid_2[:, None])
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1
    _announce(numbers, empty, step, number, STAGES)
    mbarrier.arrive(full.index(step % STAGES))
    async_copy.mbarrier_arrive(full.index(step % STAGES), increment_count=False)


@gluon.jit
def _clamp(values, LIMIT: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr, BOTH: gl.constexpr):
    """values float32, at most LIMIT rounded to ``dtype``, with BOTH at least its negative; NaN stays."""
    if LIMIT is not None:
        bound = gl.full([HALF, GROUP], LIMIT, dtype, layout).to(gl.float32)
        values = gl.where(values > bound, bound, values)
        if BOTH:
            values = gl.where(values < -bound, -bound, values)
    return values


@gluon.jit
def _store(rows, out_ptr, run, column, pairs, width, AT_ONCE: gl.constexpr):
    """rows [64, 128] to the rows of out that the pairs of ``run`` name, from ``column`` on; AT_ONCE per thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, AT_ONCE], [AT_ONCE // 4, 128 // AT_ONCE], [4, 1], [1, 0])
    order = gl.load(run + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout)))
    columns = column + gl.arange(0, GROUP, layout=gl.SliceLayout(0, layout))
    at = out_ptr + (order.to(gl.int64) * width)[:, None] + columns[None, :]
    gl.store(at, gl.convert_layout(rows, layout), mask=(order < pairs)[:, None])


@gluon.jit
def _sums(x_bufs, w_bufs, full, empty, step, steps, layout: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr):
    """Two sums of 128 columns over ``steps`` slots without scales; one product begins while the one before it runs."""
    acc = gl.zeros([HALF, 2 * GROUP], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
    for k in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(x_bufs.index(2 * slot + PART), w_bufs.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    first, second = gl.split(acc.reshape([HALF, 2, GROUP]).permute([0, 2, 1]))
    return gl.convert_layout(first, layout), gl.convert_layout(second, layout)


@gluon.jit
def _multiply(
    x_bufs, w_bufs, numbers, full, empty, x_scale_ptr, w_scale_ptr, order_ptr, block_expert_ptr, num_blocks_ptr,
    out_ptr, out_scale_ptr, pairs, width, k_dim, x_scale_stride, x_scale_step, tiles, group,
    TOP_K: gl.constexpr, GATE_UP: gl.constexpr, STAGES: gl.constexpr, LIMIT: gl.constexpr,
    LARGEST: gl.constexpr, dtype: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The PART-th 64 rows of each tile: two sums of 128 columns, activated for GATE_UP, and with scales quantised."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, sums))
    zero = gl.zeros([HALF, GROUP], gl.float32, sums)
    num_blocks = gl.load(num_blocks_ptr)
    steps = k_dim // w_bufs.shape[2]
    apart = (width // GROUP if GATE_UP else 1) * steps
    step = 0
    number = _announced(numbers, full, step, STAGES)
    while number < num_blocks * tiles:
        block, tile = _place(number, num_blocks, tiles, group)
        run = order_ptr + block * ROWS + PART * HALF
        if gl.load(run) < pairs:
            order = gl.load(run + lane)
            valid = order < pairs
            members = gl.where(valid, order, 0)
            if x_scale_ptr is None:
                acc, acc_2 = _sums(x_bufs, w_bufs, full, empty, step, steps, sums, STAGES, PART)
                step += steps
            else:
                source = (members // TOP_K if GATE_UP else members).to(gl.int64)
                x_scale_at = x_scale_ptr + source * x_scale_stride
                row = gl.load(block_expert_ptr + block) * (width // GROUP * (1 + GATE_UP)) + tile * (2 - GATE_UP)
                w_scale_at = w_scale_ptr + row.to(gl.int64) * steps
                acc = zero
                acc_2 = zero
                x_scale = gl.load(x_scale_at)
                scale, scale_2 = x_scale * gl.load(w_scale_at), x_scale * gl.load(w_scale_at + apart)
                for k in range(1, steps + 1):
                    # Scales are read one step before they are used: their latency is longer than a product.
                    ahead = gl.minimum(k, steps - 1)
                    x_scale = gl.load(x_scale_at + ahead * x_scale_step)
                    w_scale, w_scale_2 = gl.load(w_scale_at + ahead), gl.load(w_scale_at + apart + ahead)
                    slot = step % STAGES
                    x, w = x_bufs.index(2 * slot + PART), w_bufs.index(slot).permute((1, 0))
                    mbarrier.wait(full.index(slot), step // STAGES & 1)
                    part = warpgroup_mma(x, w.slice(0, GROUP, 1), zero, use_acc=False, is_async=True)
                    part = warpgroup_mma_wait(0, deps=[part])
                    acc = acc + part * scale[:, None]
                    part = warpgroup_mma(x, w.slice(GROUP, GROUP, 1), zero, use_acc=False, is_async=True)
                    part = warpgroup_mma_wait(0, deps=[part])
                    mbarrier.arrive(empty.index(slot))
                    acc_2 = acc_2 + part * scale_2[:, None]
                    scale, scale_2 = x_scale * w_scale, x_scale * w_scale_2
                    step += 1
            if GATE_UP:
                gate = _clamp(acc.to(dtype).to(gl.float32), LIMIT, dtype, sums, False)
                silu = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
                out = (silu * _clamp(acc_2.to(dtype).to(gl.float32), LIMIT, dtype, sums, True)).to(dtype)
                if out_scale_ptr is not None:
                    out = out.to(gl.float32)
                    bits = gl.max(gl.cast(gl.abs(out), gl.int32, bitcast=True), axis=1)
                    largest = gl.cast(gl.maximum(bits, LEAST), gl.float32, bitcast=True)
                    scale = gl.div_rn(largest, gl.full([HALF], LARGEST, gl.float32, gl.SliceLayout(1, sums)))
                    out = gl.div_rn(out, gl.expand_dims(scale, 1) + zero).to(out_ptr.dtype.element_ty)
                    gl.store(out_scale_ptr + members.to(gl.int64) * (width // GROUP) + tile, scale, mask=valid)
                _store(out, out_ptr, run, tile * GROUP, pairs, width, w_bufs.shape[2] // 8)
            else:
                _store(acc.to(dtype), out_ptr, run, tile * 2 * GROUP, pairs, width, 8)
                _store(acc_2.to(dtype), out_ptr, run, tile * 2 * GROUP + GROUP, pairs, width, 8)
        else:
            for _ in range(steps):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                mbarrier.arrive(empty.index(slot))
                step += 1
        number = _announced(numbers, full, step, STAGES)


@gluon.jit(do_not_specialize=["pairs", "group"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def many_tokens_sm90_kernel(
    x_ptr, x_scale_ptr, w_desc, w_scale_ptr, order_ptr, block_expert_ptr, num_blocks_ptr, out_ptr, out_scale_ptr,
    pairs, width, k_dim, x_stride, x_scale_stride, x_scale_step, tiles, group,
    TOP_K: gl.constexpr, GATE_UP: gl.constexpr, STAGES: gl.constexpr, LIMIT: gl.constexpr,
    LARGEST: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """As ``many_tokens_kernel`` with blocks of 128 pairs; w_desc reads weights [E * rows, K] in tiles of 128 rows.

    Rows and weights are of 16 bits where x_scale_ptr, w_scale_ptr and out_scale_ptr are None. Behind num_blocks stands
    a counter, 0 before and after.
    """
    STEP: gl.constexpr = w_desc.block_shape[1]
    x_bufs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2 * STAGES, HALF, STEP], w_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2 * GROUP, STEP], w_desc.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        # Each of the 128 threads that copy rows, and the one that announces the weights' bytes.
        mbarrier.init(full.index(slot), count=129)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                x_bufs, w_bufs, numbers, full, empty, x_scale_ptr, w_scale_ptr, order_ptr, block_expert_ptr,
                num_blocks_ptr, out_ptr, out_scale_ptr, pairs, width, k_dim, x_scale_stride, x_scale_step, tiles, group,
                TOP_K, GATE_UP, STAGES, LIMIT, LARGEST, dtype, 0,
            )),
            (_multiply, (
                x_bufs, w_bufs, numbers, full, empty, x_scale_ptr, w_scale_ptr, order_ptr, block_expert_ptr,
                num_blocks_ptr, out_ptr, out_scale_ptr, pairs, width, k_dim, x_scale_stride, x_scale_step, tiles, group,
                TOP_K, GATE_UP, STAGES, LIMIT, LARGEST, dtype, 1,
            )),
            (_fetch, (
                x_bufs, w_bufs, numbers, full, empty, x_ptr, w_desc, order_ptr, block_expert_ptr, num_blocks_ptr,
                pairs, width, k_dim, x_stride, tiles, group, TOP_K, GATE_UP, STAGES,
            )),
        ],
        [4, 4], [232, 40],
    )  # fmt: skip
