"""The routed experts of a Mixture-of-Experts layer: both products, the activation and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import (
    FLOATS,
    aiter_impl,
    cdiv,
    early_start,
    imports_gluon,
    next_power_of_2,
    triton_dtype,
    triton_impl,
)
from sglang.kernels.ops.activation.silu_and_mul import limit_option, silu_and_mul_torch
from sglang.kernels.ops.attention.tiles import multiprocessors
from sglang.kernels.ops.moe.fused_experts_aiter import (
    fits_fused,
    fused_experts_aiter,
    is_shuffled,
    require_unshuffled,
    shuffle_for_aiter,
)
from sglang.kernels.ops.moe.tiles import choose_tiles
from sglang.kernels.ops.quant.group_fp8 import GROUP
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

SM90_BODIES = "sglang.kernels.ops.moe.fused_experts_sm90_triton"
# Experts whose counts one program of the ordering holds.
MAX_TRITON_EXPERTS = 4096
# Multiply-adds, and weights, up to which a host computes every token at every expert sooner than it calls a product per
# expert. More weights than a core's cache holds are read for nothing where few experts are chosen.
DENSE_PRODUCTS, DENSE_WEIGHTS = 1 << 22, 1 << 19


def fused_experts_torch(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None = None
) -> Tensor:
    """``y[n] = sum_j weights[n, j] * w2[e] (silu(w1[e] x[n]) * (w3[e] x[n]))`` with ``e = ids[n, j]``.

    x [N, H], w13 [E, 2I, H] (gate rows, then up rows), w2 [E, H, I], topk_weights [N, k] float32, topk_ids [N, k]
    integers in [-1, E): -1 adds nothing, and an expert may stand in a row more than once. Returns a new [N, H] in
    x's dtype; x is never written. The sum over j is in float32. ``limit`` clamps as in ``activation.silu_and_mul``.
    """
    require_unshuffled(w13)
    num_tokens, hidden = x.shape
    top_k = topk_ids.shape[1]
    experts, intermediate = w13.shape[0], w2.shape[2]
    weights = w13.numel() + w2.numel()
    is_small = weights <= DENSE_WEIGHTS and num_tokens * weights <= DENSE_PRODUCTS
    if x.device.type == "cpu" and is_small and w13.is_contiguous():
        return _few_small_products(x, w13, w2, topk_weights, topk_ids, limit)
    flat = topk_ids.reshape(-1).long()
    order = flat.argsort(stable=True)
    # The one copy of routing data to the host: rows of each expert, those of id -1 first.
    counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    skipped = counts[0]
    rows = x.index_select(0, order // top_k)
    gate_up = rows.new_empty(num_tokens * top_k, 2 * intermediate)
    active = []
    start = skipped
    for expert, count in enumerate(counts[1:]):
        if count:
            active.append((expert, start, start + count))
            torch.mm(rows[start : start + count], w13[expert].t(), out=gate_up[start : start + count])
            start += count
    activated = silu_and_mul_torch(gate_up, limit)
    for expert, start, end in active:
        torch.mm(activated[start:end], w2[expert].t(), out=rows[start:end])
    if skipped:
        rows[:skipped] = 0
        topk_weights = topk_weights.masked_fill(topk_ids < 0, 0.0)
    by_token = torch.empty_like(rows).index_copy_(0, order, rows).view(num_tokens, top_k, hidden)
    return torch.bmm(topk_weights.float().unsqueeze(1), by_token.float()).squeeze(1).to(x.dtype)


def _few_small_products(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None
) -> Tensor:
    """The same with each product over all experts, from which the needed rows are selected."""
    (num_tokens, top_k), hidden = topk_ids.shape, x.shape[1]
    activated = silu_and_mul_torch((x @ w13.flatten(0, 1).t()).unflatten(1, (len(w13), -1)), limit)
    by_expert = torch.bmm(activated.transpose(0, 1), w2.transpose(1, 2)).flatten(0, 1)
    places = topk_ids.long() * num_tokens + torch.arange(num_tokens, device=x.device).unsqueeze(1)
    skipped = topk_ids < 0
    is_any_skipped = bool(skipped.any())
    if is_any_skipped:
        places = places.clamp(min=0)
    rows = by_expert.index_select(0, places.flatten()).view(num_tokens, top_k, hidden).float()
    if is_any_skipped:
        rows, topk_weights = rows.masked_fill(skipped.unsqueeze(2), 0.0), topk_weights.masked_fill(skipped, 0.0)
    return torch.bmm(topk_weights.float().unsqueeze(1), rows).squeeze(1).to(x.dtype)


class PairOrder(NamedTuple):
    """Pairs by expert: blocks of pair numbers, each block's expert, how many blocks there are (on the device) and 0."""

    pairs: Tensor
    block_experts: Tensor
    num_blocks: Tensor
    max_blocks: int


def order_pairs(topk_ids: Tensor, num_experts: int, block_m: int) -> PairOrder:
    """Sort the pairs of ``topk_ids`` [N, k] by expert, stably, each expert's run padded to blocks of ``block_m``.

    Padding holds N * k; pairs of id -1 are left out; entries past ``num_blocks`` are not written. Nothing is read back.
    """
    from sglang.kernels.ops.moe.fused_experts_triton import count_pairs_kernel, place_pairs_kernel

    pairs = topk_ids.numel()
    active = min(pairs, num_experts)
    max_blocks = active + (pairs - active) // block_m
    sizes = (num_experts, max_blocks * block_m, max_blocks, 2)
    scratch = torch.empty(sum(sizes), dtype=torch.int32, device=topk_ids.device)
    counts, order, block_experts, num_blocks = scratch.split(sizes)
    chunk = min(2048, max(128, next_power_of_2(pairs)))
    count_pairs_kernel[(num_experts,)](topk_ids, counts, pairs, CHUNK=chunk, num_warps=4, **early_start())
    place_pairs_kernel[(num_experts,)](
        topk_ids, counts, order, block_experts, num_blocks, pairs, num_experts,
        BLOCK_M=block_m, EXPERTS=next_power_of_2(num_experts), CHUNK=chunk, num_warps=4, **early_start(),
    )  # fmt: skip
    return PairOrder(order, block_experts, num_blocks, max_blocks)


@dataclass(frozen=True)
class Scaled:
    """Rows or stacked weights, and the scales of their groups or blocks when they are 8-bit floats."""

    data: Tensor
    scale: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.scale is not None


def one_token_product(
    x: Scaled, w: Scaled, ids: Tensor, tile: dict[str, Any], dtype: torch.dtype, is_gate_up: bool,
    limit: float | None = None,
) -> Tensor:  # fmt: skip
    """x [1, H] -> activated rows [k, I], or x [k, I] -> rows [k, H], in ``dtype``; skipped pairs are not written."""
    from sglang.kernels.ops.moe.fused_experts_triton import one_token_kernel

    pairs, k_dim = ids.numel(), x.data.shape[1]
    width = w.data.shape[1] // 2 if is_gate_up else w.data.shape[1]
    out = torch.empty(pairs, width, dtype=dtype, device=w.data.device)
    tiles = cdiv(width, tile["BLOCK_N"])
    one_token_kernel[(pairs * tiles,)](
        x.data, x.scale, w.data, w.scale, ids, out, width, k_dim, w.data.stride(0), w.data.stride(1), tiles,
        GATE_UP=is_gate_up, FP8=w.is_fp8, **limit_option(limit), **tile, **early_start(),
    )  # fmt: skip
    return out


def one_token_down(
    activated: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, tile: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    """activated [k, I] -> [1, H] in ``dtype``, weighted and summed."""
    from sglang.kernels.ops.moe.fused_experts_triton import one_token_down_kernel

    pairs, hidden, width = ids.numel(), w2.shape[1], w2.shape[2]
    out = torch.empty(1, hidden, dtype=dtype, device=w2.device)
    one_token_down_kernel[(cdiv(hidden, tile["BLOCK_N"]),)](
        activated, w2, ids, weights, out, pairs, hidden, width, w2.stride(0), w2.stride(1),
        PAIRS=next_power_of_2(pairs), **tile, **early_start(),
    )  # fmt: skip
    return out


def expert_product(
    x: Scaled, w: Scaled, ids: Tensor, order: PairOrder | None, tile: dict[str, Any], block_m: int, is_gate_up: bool,
    dtype: torch.dtype, limit: float | None = None,
) -> Scaled:  # fmt: skip
    """One of the two products for all pairs, [N * k, width] in ``dtype``; rows of skipped pairs are not written.

    Where a tile of activated 8-bit rows is one group of 128 columns, they come quantised instead.
    """
    from sglang.kernels.ops.moe.fused_experts_triton import few_tokens_kernel, many_tokens_kernel

    if order is not None and "SLOTS" in tile:
        return slots_product(x, w, ids, order, tile, is_gate_up, dtype, limit)
    pairs, k_dim = ids.numel(), x.data.shape[1]
    width = w.data.shape[1] // 2 if is_gate_up else w.data.shape[1]
    if tile.get("TWO") and width % (2 * tile["BLOCK_N"]):
        tile = {**tile, "TWO": False}
    tiles = cdiv(width, tile["BLOCK_N"] * (1 + tile.get("TWO", False)))
    operands = (x.data, x.scale, w.data, w.scale)
    scale_strides = (0, 0) if x.scale is None else x.scale.stride()
    strides = (x.data.stride(0), *scale_strides, w.data.stride(0), w.data.stride(1))
    shape = {"TOP_K": ids.shape[1], "GATE_UP": is_gate_up, "FP8": w.is_fp8, "BLOCK_M": block_m}
    shape.update(limit_option(limit))
    shape["EVEN_K"] = k_dim % tile["BLOCK_K"] == 0
    if order is None:
        out = torch.empty(pairs, width, dtype=dtype, device=ids.device)
        few_tokens_kernel[(pairs * tiles,)](
            *operands, ids, out, pairs, width, k_dim, *strides, tiles,
            PAIRS=max(16, next_power_of_2(pairs)), **shape, **tile, **early_start(),
        )  # fmt: skip
        return Scaled(out)
    is_quantized = is_gate_up and w.is_fp8 and tile["BLOCK_N"] == GROUP
    out = torch.empty(pairs, width, dtype=x.data.dtype if is_quantized else dtype, device=ids.device)
    scale = None
    if is_quantized:
        scale = torch.empty(pairs, width // GROUP, dtype=torch.float32, device=ids.device)
        shape |= {"out_scale_ptr": scale, "LARGEST": torch.finfo(out.dtype).max, "ROWS": triton_dtype(dtype)}
    many_tokens_kernel[(order.max_blocks * tiles,)](
        *operands, order.pairs, order.block_experts, order.num_blocks, out,
        pairs, width, k_dim, *strides, order.max_blocks, tiles, **shape, **tile, **early_start(),
    )  # fmt: skip
    return Scaled(out, scale)


def fits_slots(x: Scaled, w13: Scaled, w2: Scaled) -> bool:
    """Whether ``slots_product`` takes both: 8 bits with scales or bfloat16, whole tiles, rows that begin at 16 B."""
    known = w13.data.itemsize == 1 if w13.is_fp8 else w13.data.dtype == torch.bfloat16
    if current_platform.arch != "sm_90" or not known:
        return False
    _, hidden, width = w2.data.shape
    tensors = (x.data, w13.data, w2.data)
    same = all(tensor.dtype == x.data.dtype and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    aligned = same and x.data.stride(0) * x.data.itemsize % 16 == 0
    dense = w13.data.is_contiguous() and w2.data.is_contiguous()
    return hidden % (2 * GROUP) == width % GROUP == 0 and aligned and dense and imports_gluon(SM90_BODIES)


def slots_product(
    x: Scaled, w: Scaled, ids: Tensor, order: PairOrder, tile: dict[str, Any], is_gate_up: bool, dtype: torch.dtype,
    limit: float | None,
) -> Scaled:  # fmt: skip
    """``expert_product`` of blocks of 128 pairs for sm_90, by the kernel whose warps load or multiply."""
    from sglang.kernels.ops.moe.fused_experts_sm90_triton import many_tokens_sm90_kernel, weight_tiles

    pairs, k_dim = ids.numel(), x.data.shape[1]
    width = w.data.shape[1] // 2 if is_gate_up else w.data.shape[1]
    tiles, rest = divmod(width, GROUP if is_gate_up else 2 * GROUP)
    assert rest == k_dim % GROUP == 0, "sizes that fits_slots() does not take"
    out = torch.empty(pairs, width, dtype=x.data.dtype if is_gate_up else dtype, device=ids.device)
    scale = None
    if is_gate_up and x.is_fp8:
        scale = torch.empty(pairs, width // GROUP, dtype=torch.float32, device=ids.device)
    scale_strides = (0, 0) if x.scale is None else x.scale.stride()
    programs = min(multiprocessors(current_platform.arch), order.max_blocks * tiles)
    many_tokens_sm90_kernel[(programs,)](
        x.data, x.scale, weight_tiles(w.data), w.scale, order.pairs, order.block_experts, order.num_blocks, out, scale,
        pairs, width, k_dim, x.data.stride(0), *scale_strides, tiles, tile["GROUP_M"], ids.shape[1], is_gate_up,
        tile["SLOTS"], limit, torch.finfo(x.data.dtype).max, triton_dtype(dtype), num_warps=4,
    )  # fmt: skip
    return Scaled(out, scale)


def weighted_sum(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """rows [N * k, H], one per pair -> [N, H]: each token's rows weighted and summed in order."""
    from sglang.kernels.ops.moe.fused_experts_triton import weighted_sum_kernel

    (num_tokens, top_k), hidden = ids.shape, rows.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=rows.dtype, device=rows.device)
    block = min(1024, next_power_of_2(hidden))
    blocks = cdiv(hidden, block)
    weighted_sum_kernel[(num_tokens * blocks,)](
        rows, ids, weights, out, hidden, blocks, TOP_K=top_k, BLOCK=block, num_warps=4, **early_start()
    )
    return out


def run_experts(
    x: Tensor, w13: Scaled, w2: Scaled, weights: Tensor, ids: Tensor, prepare: Callable[[Tensor], Scaled],
    dtype: torch.dtype | None = None, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """The experts by the path that shapes and arch choose; ``prepare`` makes a product's operand of its rows.

    Results are of ``dtype``, by default x's; ``limit`` clamps between the products.
    Besides ``prepare``: one token takes two launches (8-bit: three), up to ``few_tokens`` three, more five.
    """
    (num_tokens, top_k), num_experts, dtype = ids.shape, w13.data.shape[0], dtype or x.dtype
    if num_tokens == 0:
        return torch.empty_like(x, dtype=dtype)
    rows = prepare(x)
    slots = fits_slots(rows, w13, w2)
    tiles = choose_tiles(current_platform.arch, 8 * w13.data.itemsize, num_tokens, top_k, num_experts, slots)
    if tiles.path == "one":
        activated = prepare(one_token_product(rows, w13, ids, tiles.gate_up, dtype, True, limit))
        # With scales a pair's row is cheaper read alone, and the rows summed by a launch of their own.
        if w2.is_fp8:
            return weighted_sum(one_token_product(activated, w2, ids, tiles.down, dtype, False), weights, ids)
        return one_token_down(activated.data, w2.data, weights, ids, tiles.down, dtype)
    order = order_pairs(ids, num_experts, tiles.block_m) if tiles.path == "many" else None
    activated = expert_product(rows, w13, ids, order, tiles.gate_up, tiles.block_m, True, dtype, limit)
    if not activated.is_fp8:
        activated = prepare(activated.data)
    product = expert_product(activated, w2, ids, order, tiles.down, tiles.block_m, False, dtype)
    return weighted_sum(product.data, weights, ids)


def fused_experts_triton(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None = None
) -> Tensor:
    return run_experts(x, Scaled(w13), Scaled(w2), topk_weights, topk_ids, Scaled, limit=limit)


def _accepts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None = None
) -> bool:
    dense = x.stride(1) == w13.stride(2) == w2.stride(2) == 1 and not is_shuffled(w13)
    same = x.dtype == w13.dtype == w2.dtype and x.dtype in FLOATS
    return dense and same and routing_fits(topk_weights, topk_ids, w13.shape[0])


def routing_fits(weights: Tensor, ids: Tensor, num_experts: int) -> bool:
    """Whether the Triton kernels read this routing."""
    dense = weights.is_contiguous() and ids.is_contiguous() and weights.dtype == torch.float32
    return dense and num_experts <= MAX_TRITON_EXPERTS and ids.shape[1] > 0


fused_experts = Op(
    "moe.fused_experts",
    aiter_impl(fused_experts_aiter, fits_fused),
    triton_impl(fused_experts_triton, _accepts),
    Impl("torch", fused_experts_torch),
)


def shuffle_experts(w13: Tensor, w2: Tensor) -> bool:
    """Shuffle loaded weights into the layout of the implementation that will run; True when they were changed."""
    return shuffle_for_aiter(fused_experts, w13, w2)
