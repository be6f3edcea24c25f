"""The routed experts with MXFP4 weights: four bits in memory, rows of activations as they are."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from sglang.kernels.launch import aiter_impl, cdiv, imports_gluon, next_power_of_2, triton_impl
from sglang.kernels.ops.activation.silu_and_mul import limit_option, silu_and_mul_torch
from sglang.kernels.ops.moe.fused_experts import PairOrder, order_pairs, routing_fits, weighted_sum
from sglang.kernels.ops.moe.fused_experts_aiter import (
    MXFP4_SINCE,
    fits_fused_mxfp4,
    fused_experts_mxfp4_aiter,
    is_shuffled,
    require_unshuffled,
    shuffle_mxfp4_for_aiter,
)
from sglang.kernels.ops.moe.tiles import MoeTiles, choose_tiles
from sglang.kernels.ops.quant.mxfp4 import (
    GRANULE,
    GROUP,
    NARROW,
    PACKED,
    place_codes,
    place_scales,
    quantize_mxfp4,
    unpack_eighths,
)
from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)

SM90_BODIES = "sglang.kernels.ops.moe.fused_experts_mxfp4_sm90_triton"

# Where ``tl.dot_scaled`` is instructions of the machine (gfx950: a conversion with the scale, then the product in
# 16 bits). Elsewhere codes become numbers in registers before the product.
SCALED_ARCHS = ("gfx950",)
# Where instructions on two bfloat16 numbers at once make them, and the first operand of a product is in registers.
PLACED_ARCHS = ("sm_90",)
# Numbers of tokens for two experts that reach each row of a tile table, and what may differ of the largest value.
PROOF_TOKENS, PROOF_BOUND = (2, 24, 100, 400), 2e-2


def is_placed(w: Tensor) -> bool:
    """Whether ``w`` holds codes as ``place_codes`` has them."""
    return getattr(w, "is_placed", False)


def fused_experts_mxfp4_torch(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> Tensor:  # fmt: skip
    """``moe.fused_experts`` with the weights that the codes and scales stand for, products in float32.

    x [N, H] float, w13 [E, 2I, H / 2] and w2 [E, H, I / 2] uint8, two codes e2m1 of a row to a byte, the first its low
    half; w13_scale [E, 2I, H / 32] and w2_scale [E, H, I / 32] uint8: 2^(b - 127), 255 NaN. H and I are multiples of
    32; routing and ``limit`` as in ``moe.fused_experts``. Returns a new [N, H] in x's dtype.
    """
    require_unshuffled(w13)
    if is_placed(w13):
        raise ValueError(
            "these experts were placed for sm_90's kernel, which does not accept this call or failed earlier (see the "
            "log). Restart with SGLANG_KERNELS forcing another implementation."
        )
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = _product(x[tokens], w13[expert], w13_scale[expert])
        rows = _product(silu_and_mul_torch(gate_up, limit), w2[expert], w2_scale[expert])
        out.index_add_(0, tokens, topk_weights[tokens, slots].unsqueeze(1) * rows.float())
    return out.to(x.dtype)


def _product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return (x.float() @ unpack_eighths(codes, scale).t()).mul_(8.0).to(x.dtype)


def mxfp4_product(
    x: Tensor, codes: Tensor, scale: Tensor, ids: Tensor, order: PairOrder | None, tile: dict[str, int], block_m: int,
    is_gate_up: bool, scaled: bool, placed: bool, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """One of the two products for all pairs, [N * k, width] in x's dtype; rows of skipped pairs are not written.

    scaled, placed: how the kernel takes the codes, see there.
    """
    from sglang.kernels.ops.moe.fused_experts_mxfp4_triton import few_tokens_mxfp4_kernel, many_tokens_mxfp4_kernel

    if "STAGES" in tile:
        return few_pairs_product(x, codes, scale, ids, order, tile, block_m, is_gate_up, limit)
    pairs, k_dim = ids.numel(), x.shape[1]
    width = codes.shape[1] // 2 if is_gate_up else codes.shape[1]
    out = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    tiles = cdiv(width, tile["BLOCK_N"])
    shape = {"TOP_K": ids.shape[1], "GATE_UP": is_gate_up, "SCALED": scaled, "PLACED": placed, "BLOCK_M": block_m}
    shape.update(limit_option(limit))
    shape["EVEN_K"] = k_dim % tile["BLOCK_K"] == 0
    if order is None:
        few_tokens_mxfp4_kernel[(pairs * tiles,)](
            x, codes, scale, ids, out, pairs, width, k_dim, codes.shape[2], scale.shape[2], x.stride(0), tiles,
            PAIRS=max(16, next_power_of_2(pairs)), **shape, **tile,
        )  # fmt: skip
    else:
        many_tokens_mxfp4_kernel[(order.max_blocks * tiles,)](
            x, codes, scale, order.pairs, order.block_experts, order.num_blocks, out,
            pairs, width, k_dim, codes.shape[2], scale.shape[2], x.stride(0), order.max_blocks, tiles, **shape, **tile,
        )  # fmt: skip
    return out


def few_pairs_product(
    x: Tensor, codes: Tensor, scale: Tensor, ids: Tensor, order: PairOrder | None, tile: dict[str, int], block_m: int,
    is_gate_up: bool, limit: float | None,
) -> Tensor:  # fmt: skip
    """``mxfp4_product`` of placed codes for sm_90, with products that do not wait for one another."""
    from sglang.kernels.ops.moe.fused_experts_mxfp4_sm90_triton import few_pairs_mxfp4_kernel

    pairs, k_dim, warps = ids.numel(), x.shape[1], tile["num_warps"]
    width = codes.shape[1] // 2 if is_gate_up else codes.shape[1]
    tiles, rest = divmod(width, 16 * warps * (2 - is_gate_up))
    assert rest == k_dim % GRANULE[1] == 0, "sizes that place_experts() leaves as they are"
    out = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    held = max(32 * warps, next_power_of_2(pairs)) if order is None else 0
    blocks = (ids, None, None) if order is None else (order.pairs, order.block_experts, order.num_blocks)
    max_blocks = pairs if order is None else order.max_blocks
    few_pairs_mxfp4_kernel[(max_blocks * tiles,)](
        x, codes, scale, *blocks, out, pairs, width, k_dim, x.stride(0), max_blocks, tiles, TOP_K=ids.shape[1],
        GATE_UP=is_gate_up, HELD=held, BLOCK_M=block_m, ROWS=16 * warps, **limit_option(limit), **tile,
    )  # fmt: skip
    return out


def mxfp4_tiles(w13: Tensor, dtype: torch.dtype, num_tokens: int, top_k: int) -> MoeTiles:
    """Those for rows of ``dtype``."""
    if is_placed(w13):
        return choose_tiles(current_platform.arch, "placed 4", num_tokens, top_k, w13.shape[0])
    # Rows of wide numbers for one token are of kernels that multiply without the matrix unit.
    bits, least = (4, 1) if dtype == torch.bfloat16 else (32, 2)
    return choose_tiles(current_platform.arch, bits, max(num_tokens, least), top_k, w13.shape[0])


def run_mxfp4(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, weights: Tensor, ids: Tensor,
    limit: float | None, scaled: bool,
) -> Tensor:  # fmt: skip
    """Three launches for few tokens, five for many; with ``scaled`` the product is the architecture's own."""
    (num_tokens, top_k), num_experts = ids.shape, w13.shape[0]
    if num_tokens == 0:
        return torch.empty_like(x)
    if is_placed(w13) and (x.data_ptr() % 16 or x.stride(0) % 16):
        x = x.clone(memory_format=torch.contiguous_format)
    tiles = mxfp4_tiles(w13, x.dtype, num_tokens, top_k)
    order = order_pairs(ids, num_experts, tiles.block_m) if tiles.path == "many" else None
    block, placed = tiles.block_m, is_placed(w13)
    activated = mxfp4_product(x, w13, w13_scale, ids, order, tiles.gate_up, block, True, scaled, placed, limit)
    rows = mxfp4_product(activated, w2, w2_scale, ids, order, tiles.down, block, False, scaled, placed)
    return weighted_sum(rows, weights, ids)


def fused_experts_mxfp4_triton(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> Tensor:  # fmt: skip
    """Codes become numbers in x's dtype in registers, before the product."""
    return run_mxfp4(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, limit, scaled=False)


def fused_experts_mxfp4_scaled(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> Tensor:  # fmt: skip
    """The product takes codes and scales as they are (``tl.dot_scaled``), once it has been proven on the device."""
    if x.device.type == "cuda":
        require_true_scaled_product(x.device)
    return run_mxfp4(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, limit, scaled=True)


@functools.cache
def require_true_scaled_product(device: torch.device) -> None:
    """RuntimeError unless ``tl.dot_scaled`` gives what the reference gives, for each tile that may be chosen.

    What a compiler makes of it where the architecture lacks it may be wrong in silence: Triton 3.6 permutes the codes
    of a row for sm_90. Raised in warm-up this leaves the codes to the form in registers, and is shown.
    """
    generator = torch.Generator().manual_seed(0)
    experts, hidden, width = 2, 256, 160
    w13, w13_scale = (part.to(device) for part in random_experts(experts, 2 * width, hidden, generator))
    w2, w2_scale = (part.to(device) for part in random_experts(experts, hidden, width, generator))
    for tokens in PROOF_TOKENS:
        x = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16)
        ids = (torch.arange(tokens, device=device, dtype=torch.int32) % experts).unsqueeze(1)
        weights = torch.ones(tokens, 1, device=device)
        wanted = fused_experts_mxfp4_torch(x.float(), w13, w13_scale, w2, w2_scale, weights, ids)
        found = run_mxfp4(x, w13, w13_scale, w2, w2_scale, weights, ids, None, scaled=True).float()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= PROOF_BOUND:
            raise RuntimeError(
                f"tl.dot_scaled is wrong on {current_platform.arch} with this release of Triton: {tokens} tokens are "
                f"off by {error:.2g} of the largest value. Use the implementation 'triton', or another release."
            )


def _accepts(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> bool:  # fmt: skip
    stacked = (w13, w13_scale, w2, w2_scale)
    dense = all(tensor.is_contiguous() and tensor.dtype == torch.uint8 for tensor in stacked) and x.stride(1) == 1
    plain = x.dtype in (torch.bfloat16, torch.float32) and not is_shuffled(w13)
    # Tiles of float32 are narrower than the layout of placed codes.
    same = is_placed(w13) == is_placed(w2) and (x.dtype == torch.bfloat16 or not is_placed(w13))
    return dense and plain and same and routing_fits(topk_weights, topk_ids, w13.shape[0])


def _accepts_scaled(x: Tensor, *args: Tensor | float | None) -> bool:
    return x.dtype == torch.bfloat16 and not is_placed(args[0]) and _accepts(x, *args)  # type: ignore[arg-type]


def random_experts(experts: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stacked matrices [experts, rows, columns] in MXFP4 of entries near N(0, 1 / columns)."""
    return quantize_mxfp4(torch.randn(experts, rows, columns, generator=generator) * columns**-0.5)


fused_experts_mxfp4 = Op(
    "moe.fused_experts_mxfp4",
    aiter_impl(fused_experts_mxfp4_aiter, fits_fused_mxfp4, archs=SCALED_ARCHS, min_version=MXFP4_SINCE),
    triton_impl(fused_experts_mxfp4_scaled, _accepts_scaled, "triton_scaled", kinds={"hip"}, archs=SCALED_ARCHS),
    triton_impl(fused_experts_mxfp4_triton, _accepts),
    Impl("torch", fused_experts_mxfp4_torch),
)


def shuffle_experts_mxfp4(
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, rounds_rows: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> bool:  # fmt: skip
    """Put loaded weights into the layout of the implementation that will run; True when they were changed.

    rounds_rows: whether the checkpoint allows AITER's, which rounds rows to MXFP4. dtype: that of rows.
    """
    if rounds_rows and shuffle_mxfp4_for_aiter(fused_experts_mxfp4, w13, w13_scale, w2, w2_scale):
        return True
    if (
        dtype != torch.bfloat16
        or current_platform.arch not in PLACED_ARCHS
        or REGISTRY.chosen(fused_experts_mxfp4) != "triton"
        or not imports_gluon(SM90_BODIES)
    ):
        return False
    return place_experts(w13, w13_scale, w2, w2_scale)


def place_experts(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> bool:
    """``place_codes`` in place, one expert at a time; False, and as they were, where sizes or scales do not allow it.

    A group of zeros may have any scale below NARROW, and gets the least.
    """
    stacks = ((w13, w13_scale), (w2, w2_scale))
    columns = GRANULE[1] // PACKED
    if (
        is_shuffled(w13)
        or is_placed(w13)
        or any(codes.shape[1] % GRANULE[0] or codes.shape[2] % columns for codes, _ in stacks)
    ):
        return False
    for codes, scale in stacks:
        for of_expert, powers in zip(codes.data, scale.data, strict=True):
            zeros = ((of_expert & 0x77) == 0).unflatten(-1, (-1, GROUP // PACKED)).all(-1)
            if bool(((powers > NARROW[1]) | ((powers < NARROW[0]) & ~zeros)).any()):
                logger.warning("scales of MXFP4 experts past 2^-63 .. 2^63: numbers are made by slower instructions")
                return False
    for codes, scale in stacks:
        marked: Any = codes
        for of_expert, powers in zip(codes.data, scale.data, strict=True):
            of_expert.copy_(place_codes(of_expert))
            powers.copy_(place_scales(powers.clamp(min=NARROW[0])))
        marked.is_placed = True
    return True
