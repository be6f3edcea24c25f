"""Triton bodies of the routed experts in MXFP4: few tokens and many; pairs and their order as in ``fused_experts``.

Codes are [E, rows, K / 2], two of a row to a byte, scales [E, rows, K / 32]. In memory a weight has four bits; with
SCALED the compiler makes the product of them what the architecture has, else they become x's dtype in registers. Both
take an eighth of each weight, which no scale byte lets overflow, and multiply the sum by 8. SCALED takes numbers with
scale bytes below 3 as if it were 3: of a size below 2^-121. With PLACED (sm_90) codes are as ``place_codes`` has them
and scale bytes NARROW; weights are the first operand of the product, which sm_90 takes from registers.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.moe.fused_experts_triton import _silu_and_mul, block_members

GROUP = tl.constexpr(32)


@triton.jit
def _eighths(code, scale, dtype):
    """code [N, C] in the low four bits, scale [N, C] of an eighth's power of two -> numbers in ``dtype``."""
    # Three bits as the last of the exponent and the first of the fraction: the number times 2^-126, 0.5 a subnormal.
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return (bits.to(tl.float32, bitcast=True) * 1.0633823966279327e37 * scale).to(dtype)  # 2^123


# Two times 16 bits of placed codes (``place_codes``), and the scale of each twice as bfloat16 -> four pairs of numbers.
PLACED_NUMBERS = tl.constexpr("""{
    .reg .b32 code, power;
    prmt.b32 power, $5, $6, 0x5410;
    and.b32 code, $4, 0x81C081C0;
    mul.bf16x2 $0, code, power;
    shl.b32 code, $4, 3;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 $1, code, power;
    and.b32 code, $4, 0x40074007;
    mul.lo.u32 code, code, 66;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 $2, code, power;
    shr.u32 code, $4, 3;
    and.b32 code, code, 0x05C005C0;
    mul.lo.u32 code, code, 33;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 $3, code, power;
}""")
# Twice the exponent of a bfloat16, and 2^64, by which scales are larger: with 2^-126 of a code, 2^-62 of the number.
TWICE, LIFT, PLACED_WHOLE = tl.constexpr(0x00800080), tl.constexpr(0x20002000), tl.constexpr(2.0**62)


@triton.jit
def _placed_numbers(w, scale, dtype, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Placed codes [N, K / 4] int16 and scale bytes [N, K / 32] -> ``dtype`` [N, K], 2^-62 of each number."""
    power = tl.reshape(scale.to(tl.int32) * TWICE + LIFT, (BLOCK_N, BLOCK_K // 128, 1, 4, 1))
    # The last three of both: a fourth of a granule's row, a group of 32 columns, the first or the next column.
    spread = tl.broadcast_to(power, (BLOCK_N, BLOCK_K // 128, 4, 4, 2))
    quads = tl.reshape(w, (BLOCK_N, BLOCK_K // 128, 4, 4, 2))
    first, second, third, fourth = tl.inline_asm_elementwise(
        PLACED_NUMBERS, "=r,=r,=r,=r,r,r,r", [quads, spread], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
    )
    # Two more, which are the number's place among 32 by 8 in order.
    numbers = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(numbers, (0, 1, 3, 5, 6, 2, 4)), (BLOCK_N, BLOCK_K)).to(dtype)


@triton.jit
def _factors(scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scale bytes [N, K / 32] -> float32 of each byte of codes [N, K / 2]."""
    wide = scale.to(tl.int32)
    power = tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    spread = tl.broadcast_to(power[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 2))
    return tl.reshape(spread, (BLOCK_N, BLOCK_K // 2))


@triton.jit
def _add_product(
    acc, x, w_at, scale_at, left, EVEN_K: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x [M, K] times an eighth of the weights, of which ``left`` columns remain; with PLACED transposed."""
    groups = tl.arange(0, BLOCK_K // GROUP)
    if EVEN_K:
        scale = tl.load(scale_at)
    else:
        scale = tl.load(scale_at, mask=(groups * GROUP < left)[None, :], other=3)
    held: tl.constexpr = 4 if PLACED else 2
    there = tl.arange(0, BLOCK_K // held) * held < left
    if EVEN_K:
        w = tl.load(w_at)
    elif SCALED:
        w = tl.load(w_at, mask=there[:, None], other=0)
    else:
        w = tl.load(w_at, mask=there[None, :], other=0)
    if SCALED:
        lower = tl.where(scale > 3, scale - 3, 0).to(tl.uint8)
        acc = tl.dot_scaled(x, None, "bf16", w, lower, "e2m1", acc)
    elif PLACED:
        numbers = _placed_numbers(w, scale, x.dtype, BLOCK_N, BLOCK_K)
        acc = tl.dot(numbers, tl.trans(x), acc, input_precision="ieee")
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], BLOCK_K // 2, 2)))
        codes, factor = w.to(tl.int32), _factors(scale, BLOCK_N, BLOCK_K)
        first, second = _eighths(codes, factor, x.dtype), _eighths(codes >> 4, factor, x.dtype)
        acc = tl.dot(even, tl.trans(first), acc, input_precision="ieee")
        acc = tl.dot(odd, tl.trans(second), acc, input_precision="ieee")
    return acc


@triton.jit
def mxfp4_tile(
    x_ptr, w_ptr, w_scale_ptr, out_ptr, members, valid, expert, tile, width, k_dim, packed, groups, x_stride,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    PLACED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LIMIT: tl.constexpr = None,
):  # fmt: skip
    """As ``expert_tile``: rows of x are tokens for GATE_UP, pairs for the down product; out rows are always pairs."""
    tl.static_assert(BLOCK_K % 128 == 0 or not PLACED, "placed codes lie in granules of 128 columns")
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    source = (members // TOP_K if GATE_UP else members).to(tl.int64)
    x_at = x_ptr + (source * x_stride)[:, None] + k[None, :]
    # Columns past the end read a real one instead of being masked: the store drops them.
    row = tl.cast(expert, tl.int64) * width * (1 + GATE_UP) + tl.minimum(n, width - 1)
    part = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // GROUP)
    if PLACED:
        # 16 bits have four codes; a granule has 64 rows of 32 of those, and of 4 scales.
        quad = tl.arange(0, BLOCK_K // 4)
        w_at = w_ptr.to(tl.pointer_type(tl.int16)) + (row // 64 * (packed * 32) + row % 64 * 32)[:, None]
        w_at += (quad // 32 * 2048 + quad % 32)[None, :]
        scale_at = w_scale_ptr + (row // 64 * (groups * 64) + row % 64 * 4)[:, None]
        scale_at += (group // 4 * 256 + group % 4)[None, :]
    else:
        w_at = w_ptr + ((row * packed)[None, :] + part[:, None] if SCALED else (row * packed)[:, None] + part[None, :])
        scale_at = w_scale_ptr + (row * groups)[:, None] + group[None, :]
    rows: tl.constexpr = BLOCK_N if PLACED else BLOCK_M
    columns: tl.constexpr = BLOCK_M if PLACED else BLOCK_N
    acc = tl.zeros([rows, columns], tl.float32)
    acc_up = tl.zeros([rows, columns], tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        left = k_dim - start
        # Rows that are none would be read from the cache all the same.
        if EVEN_K:
            x = tl.load(x_at, mask=valid[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=valid[:, None] & (k < left)[None, :], other=0.0)
        acc = _add_product(acc, x, w_at, scale_at, left, EVEN_K, SCALED, PLACED, BLOCK_N, BLOCK_K)
        if GATE_UP:
            up_at, up_scale_at = w_at + width * (packed // 2 if PLACED else packed), scale_at + width * groups
            acc_up = _add_product(acc_up, x, up_at, up_scale_at, left, EVEN_K, SCALED, PLACED, BLOCK_N, BLOCK_K)
        x_at += BLOCK_K
        w_at += BLOCK_K * 16 if PLACED else BLOCK_K // 2
        scale_at += BLOCK_K * 2 if PLACED else BLOCK_K // GROUP
    dtype = out_ptr.dtype.element_ty
    whole: tl.constexpr = PLACED_WHOLE if PLACED else 8.0
    acc *= whole
    out = _silu_and_mul(acc, acc_up * whole, dtype, LIMIT) if GATE_UP else acc.to(dtype)
    out = tl.trans(out) if PLACED else out
    mask = valid[:, None] & (n < width)[None, :]
    tl.store(out_ptr + members.to(tl.int64)[:, None] * width + n[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def few_tokens_mxfp4_kernel(
    x_ptr, w_ptr, w_scale_ptr, ids_ptr, out_ptr, pairs, width, k_dim, packed, groups, x_stride, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LIMIT: tl.constexpr = None,
):  # fmt: skip
    """As ``few_tokens_kernel``: every BLOCK_M-th pair of an expert gathers those up to the next (pairs <= PAIRS)."""
    first, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert = tl.load(ids_ptr + first)
    pair = tl.arange(0, PAIRS)
    same = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert
    before = tl.sum((same & (pair < first)).to(tl.int32), axis=0)
    if (expert >= 0) & (before % BLOCK_M == 0):
        members, valid = block_members(pair, same, before, BLOCK_M)
        mxfp4_tile(
            x_ptr, w_ptr, w_scale_ptr, out_ptr, members, valid, expert, tile,
            width, k_dim, packed, groups, x_stride, TOP_K, GATE_UP, EVEN_K,
            SCALED, PLACED, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "max_blocks"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def many_tokens_mxfp4_kernel(
    x_ptr, w_ptr, w_scale_ptr, order_ptr, block_expert_ptr, num_blocks_ptr, out_ptr,
    pairs, width, k_dim, packed, groups, x_stride, max_blocks, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    PLACED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    LIMIT: tl.constexpr = None,
):  # fmt: skip
    """As ``many_tokens_kernel``: one block of ordered pairs times one tile of columns."""
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles
    first = pid // in_group * GROUP_M
    size = tl.minimum(max_blocks - first, GROUP_M)
    block, tile = first + (pid % in_group) % size, (pid % in_group) // size
    if block < tl.load(num_blocks_ptr):
        expert = tl.load(block_expert_ptr + block)
        order = tl.load(order_ptr + block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
        valid = order < pairs
        mxfp4_tile(
            x_ptr, w_ptr, w_scale_ptr, out_ptr, tl.where(valid, order, 0), valid, expert, tile,
            width, k_dim, packed, groups, x_stride, TOP_K, GATE_UP, EVEN_K,
            SCALED, PLACED, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT,
        )  # fmt: skip
