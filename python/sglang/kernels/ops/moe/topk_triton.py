"""Every router family in one Triton body: score, group limit, choice and weights of one token a program."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead
from sglang.kernels.ops.sampling.greedy_triton import key_index, order_key


@triton.jit
def _group_worth(choice, keys, TOP2: tl.constexpr):
    """[GROUPS, 1] scores: the best expert of a group, or the sum of its best two."""
    lowest: tl.constexpr = -0x8000000000000000
    first = keys == tl.max(keys, axis=1, keep_dims=True)
    worth = tl.sum(tl.where(first, choice, 0.0), axis=1, keep_dims=True)
    if TOP2:
        left = tl.where(first, lowest, keys)
        second = left == tl.max(left, axis=1, keep_dims=True)
        worth += tl.sum(tl.where(second, choice, 0.0), axis=1, keep_dims=True)
    return worth


@triton.jit
def _all_max(x):
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def router_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr,
    row_stride, group_size, scale, shared_weight,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, K_BLOCK: tl.constexpr,
    N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The token's experts as a tile [GROUPS >= N_GROUP, SIZE >= group_size]; TOP_K <= experts of TOPK_GROUP groups.

    SHARED ids after the last expert follow; with GATED the column there is their gate.
    """
    wait_for_kernel_ahead()
    lowest: tl.constexpr = -0x8000000000000000
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, SIZE)[None, :]
    expert = group * group_size + member
    real = (group < N_GROUP) & (member < group_size)
    logits = tl.load(logits_ptr + token * row_stride + expert, mask=real, other=float("-inf")).to(tl.float32)
    if SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    elif SCORING == "sqrtsoftplus":
        # The logarithm of 1 + power, which loses no digits of a small power.
        power = tl.exp(-tl.abs(logits))
        wide = 1.0 + power
        log = tl.where(wide == 1.0, power, tl.log(wide) * (power / tl.where(wide == 1.0, 1.0, wide - 1.0)))
        scores = tl.sqrt(tl.where(logits > 0.0, logits, 0.0) + log)
    else:
        # A row that holds NaN, or nothing above -inf, gives NaN weights, as the reference does.
        powers = tl.exp(logits - _all_max(logits))
        scores = tl.where(real, powers, 0.0)
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
    keys = tl.where(real, order_key(choice, expert), lowest)
    if TOPK_GROUP < N_GROUP:
        group_keys = tl.where(group < N_GROUP, order_key(_group_worth(choice, keys, HAS_BIAS), group), lowest)
        kept = group < 0
        for _ in tl.static_range(TOPK_GROUP):
            best = group_keys == tl.max(group_keys, axis=0, keep_dims=True)
            kept = kept | best
            group_keys = tl.where(best, lowest, group_keys)
        keys = tl.where(kept, keys, lowest)
    slot = tl.arange(0, K_BLOCK)
    ids = tl.zeros([K_BLOCK], tl.int32)
    weights = tl.zeros([K_BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        top = _all_max(keys)
        chosen = keys == top
        ids = tl.where(slot == j, key_index(top).to(tl.int32), ids)
        weight = tl.sum(tl.sum(tl.where(chosen, scores, 0.0), axis=1), axis=0)
        weights = tl.where(slot == j, weight, weights)
        keys = tl.where(chosen, lowest, keys)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    weights *= scale
    if SHARED:
        experts = N_GROUP * group_size
        if GATED:
            gate = tl.load(logits_ptr + token * row_stride + experts).to(tl.float32)
            shared_weight = shared_weight / (1.0 + tl.exp(-gate))
        weights = tl.where(slot < TOP_K, weights, shared_weight)
        ids = tl.where(slot < TOP_K, ids, experts + slot - TOP_K)
    at = token * (TOP_K + SHARED) + slot
    tl.store(weights_ptr + at, weights, mask=slot < TOP_K + SHARED)
    tl.store(ids_ptr + at, ids, mask=slot < TOP_K + SHARED)
