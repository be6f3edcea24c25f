"""Triton bodies of the routed experts in MXFP4: few tokens and many; pairs and their order as in ``fused_experts``.

Codes are [E, rows, K / 2], two of a row to a byte, scales [E, rows, K / 32]. In memory a weight has four bits; with
SCALED the compiler makes the product of them what the architecture has, else they become x's dtype in registers. Both
take an eighth of each weight, which no scale byte lets overflow, and multiply the sum by 8. SCALED takes numbers with
scale bytes below 3 as if it were 3: of a size below 2^-121.
"""

import triton
import triton.language as tl

from sglang.kernels.ops.moe.fused_experts_triton import _silu_and_mul

GROUP = tl.constexpr(32)


@triton.jit
def _eighths(code, scale, dtype):
    """code [N, C] in the low four bits, scale [N, C] of an eighth's power of two -> numbers in ``dtype``."""
    # Three bits as the last of the exponent and the first of the fraction: the number times 2^-126, 0.5 a subnormal.
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return (bits.to(tl.float32, bitcast=True) * 1.0633823966279327e37 * scale).to(dtype)  # 2^123


# Four bytes of codes, and their scales as bfloat16 -> an eighth of the first and of the second number of each byte.
# The bits of a code times 2^12 + 2^6 are its sign in place, and the last of the exponent and the first of the fraction:
# the number times 2^-126.
SM90_EIGHTHS = tl.constexpr("""{
    .reg .b32 low, high, code, most;
    mov.b32 most, 0x7D007D00;
    prmt.b32 low, $4, 0, 0x4140;
    prmt.b32 high, $4, 0, 0x4342;
    and.b32 code, low, 0x000F000F;
    mul.lo.u32 code, code, 4160;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 code, code, most;
    mul.bf16x2 $0, code, $5;
    and.b32 code, high, 0x000F000F;
    mul.lo.u32 code, code, 4160;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 code, code, most;
    mul.bf16x2 $1, code, $6;
    and.b32 code, low, 0x00F000F0;
    mul.lo.u32 code, code, 260;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 code, code, most;
    mul.bf16x2 $2, code, $5;
    and.b32 code, high, 0x00F000F0;
    mul.lo.u32 code, code, 260;
    and.b32 code, code, 0x81C081C0;
    mul.bf16x2 code, code, most;
    mul.bf16x2 $3, code, $6;
}""")


@triton.jit
def _sm90_eighths(codes, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes of codes [N, K / 2] and scale bytes [N, K / 32] -> two bfloat16 [N, K / 2]."""
    # Byte 0 is a subnormal number.
    power = tl.maximum(scale.to(tl.int16) << 7, 1 << 6).to(tl.int16).to(tl.bfloat16, bitcast=True)
    spread = tl.broadcast_to(power[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 2))
    spread = tl.reshape(spread, (BLOCK_N, BLOCK_K // 2))
    return tl.inline_asm_elementwise(
        SM90_EIGHTHS, "=r,=r,=r,=r,r,r,r", [codes, spread], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )


@triton.jit
def _factors(scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scale bytes [N, K / 32] -> float32 of each byte of codes [N, K / 2]."""
    wide = scale.to(tl.int32)
    power = tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    spread = tl.broadcast_to(power[:, :, None], (BLOCK_N, BLOCK_K // GROUP, GROUP // 2))
    return tl.reshape(spread, (BLOCK_N, BLOCK_K // 2))


@triton.jit
def _add_product(
    acc, x, w_at, scale_at, left, EVEN_K: tl.constexpr, SCALED: tl.constexpr, SM90: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x [M, K] times an eighth of the weights, of which ``left`` columns remain."""
    groups = tl.arange(0, BLOCK_K // GROUP)
    if EVEN_K:
        scale = tl.load(scale_at)
    else:
        scale = tl.load(scale_at, mask=(groups * GROUP < left)[None, :], other=3)
    pairs = tl.arange(0, BLOCK_K // 2) * 2 < left
    if SCALED:
        if EVEN_K:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=pairs[:, None], other=0)
        lower = tl.where(scale > 3, scale - 3, 0).to(tl.uint8)
        acc = tl.dot_scaled(x, None, "bf16", w, lower, "e2m1", acc)
    else:
        if EVEN_K:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=pairs[None, :], other=0)
        even, odd = tl.split(tl.reshape(x, (x.shape[0], BLOCK_K // 2, 2)))
        if SM90:
            first, second = _sm90_eighths(w, scale, BLOCK_N, BLOCK_K)
        else:
            codes, factor = w.to(tl.int32), _factors(scale, BLOCK_N, BLOCK_K)
            first, second = _eighths(codes, factor, x.dtype), _eighths(codes >> 4, factor, x.dtype)
        acc = tl.dot(even, tl.trans(first), acc, input_precision="ieee")
        acc = tl.dot(odd, tl.trans(second), acc, input_precision="ieee")
    return acc


@triton.jit
def mxfp4_tile(
    x_ptr, w_ptr, w_scale_ptr, out_ptr, members, valid, expert, tile, width, k_dim, packed, groups, x_stride,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    SM90: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LIMIT: tl.constexpr = None,
):  # fmt: skip
    """As ``expert_tile``: rows of x are tokens for GATE_UP, pairs for the down product; out rows are always pairs."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    source = (members // TOP_K if GATE_UP else members).to(tl.int64)
    x_at = x_ptr + (source * x_stride)[:, None] + k[None, :]
    # Columns past the end read a real one instead of being masked: the store drops them.
    row = tl.cast(expert, tl.int64) * width * (1 + GATE_UP) + tl.minimum(n, width - 1)
    if SCALED:
        w_at = w_ptr + (row * packed)[None, :] + tl.arange(0, BLOCK_K // 2)[:, None]
    else:
        w_at = w_ptr + (row * packed)[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
    scale_at = w_scale_ptr + (row * groups)[:, None] + tl.arange(0, BLOCK_K // GROUP)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k_dim, BLOCK_K):
        left = k_dim - start
        if EVEN_K:
            x = tl.load(x_at)
        else:
            x = tl.load(x_at, mask=(k < left)[None, :], other=0.0)
        acc = _add_product(acc, x, w_at, scale_at, left, EVEN_K, SCALED, SM90, BLOCK_N, BLOCK_K)
        if GATE_UP:
            up_at, up_scale_at = w_at + width * packed, scale_at + width * groups
            acc_up = _add_product(acc_up, x, up_at, up_scale_at, left, EVEN_K, SCALED, SM90, BLOCK_N, BLOCK_K)
        x_at += BLOCK_K
        w_at += BLOCK_K // 2
        scale_at += BLOCK_K // GROUP
    dtype = out_ptr.dtype.element_ty
    acc *= 8.0
    out = _silu_and_mul(acc, acc_up * 8.0, dtype, LIMIT) if GATE_UP else acc.to(dtype)
    mask = valid[:, None] & (n < width)[None, :]
    tl.store(out_ptr + members.to(tl.int64)[:, None] * width + n[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def few_tokens_mxfp4_kernel(
    x_ptr, w_ptr, w_scale_ptr, ids_ptr, out_ptr, pairs, width, k_dim, packed, groups, x_stride, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr, SM90: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LIMIT: tl.constexpr = None,
):  # fmt: skip
    """As ``few_tokens_kernel``: the first pair of each expert gathers the others (pairs <= PAIRS), the rest leave."""
    first, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert = tl.load(ids_ptr + first)
    pair = tl.arange(0, PAIRS)
    same = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert
    leads = tl.min(tl.where(same, pair, PAIRS), axis=0) == first
    if (expert >= 0) & leads:
        count = tl.sum(same.to(tl.int32), axis=0)
        rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
        slot = tl.arange(0, BLOCK_M)
        for start in range(0, count, BLOCK_M):
            here = same[:, None] & (rank[:, None] == start + slot[None, :])
            members = tl.sum(tl.where(here, pair[:, None], 0), axis=0)
            mxfp4_tile(
                x_ptr, w_ptr, w_scale_ptr, out_ptr, members, start + slot < count, expert, tile,
                width, k_dim, packed, groups, x_stride, TOP_K, GATE_UP, EVEN_K,
                SCALED, SM90, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "max_blocks"], do_not_specialize_on_alignment=["num_blocks_ptr"])
def many_tokens_mxfp4_kernel(
    x_ptr, w_ptr, w_scale_ptr, order_ptr, block_expert_ptr, num_blocks_ptr, out_ptr,
    pairs, width, k_dim, packed, groups, x_stride, max_blocks, tiles,
    TOP_K: tl.constexpr, GATE_UP: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    SM90: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
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
            SCALED, SM90, BLOCK_M, BLOCK_N, BLOCK_K, LIMIT,
        )  # fmt: skip
