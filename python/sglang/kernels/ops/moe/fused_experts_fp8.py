"""The routed experts with 8-bit weights in 128x128 blocks and activations quantised by groups of 128."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, aiter_impl, triton_impl
from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul_torch
from sglang.kernels.ops.moe.fused_experts import Scaled, routing_fits, run_experts
from sglang.kernels.ops.moe.fused_experts_aiter import (
    fits_fused_fp8,
    fused_experts_fp8_aiter,
    is_shuffled,
    require_unshuffled,
    shuffle_for_aiter,
)
from sglang.kernels.ops.quant.group_fp8 import (
    GROUP,
    block_fp8_linear_torch,
    fp8_dtype,
    quantize_groups_triton,
    scaled_product,
    with_scales,
)
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform


def fused_experts_fp8_torch(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    x_scale: Tensor | None = None, dtype: torch.dtype | None = None, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """``moe.fused_experts`` with both products as ``quant.block_fp8_linear``.

    x [N, H], w13 [E, 2I, H] and w2 [E, H, I] 8-bit, w13_scale [E, 2I / 128, H / 128] and w2_scale [E, H / 128, I / 128]
    float32, H and I multiples of 128; routing as in ``moe.fused_experts``. Returns a new [N, H] in x's dtype.
    Rows that are quantised already come in w13's dtype with their x_scale [N, H / 128] and the ``dtype`` of the result.
    """
    require_unshuffled(w13)
    dtype = x.dtype if dtype is None else dtype
    q, scale = with_scales(x, x_scale, w13.dtype)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = scaled_product(q[tokens], scale[tokens], w13[expert], w13_scale[expert]).to(dtype)
        rows = block_fp8_linear_torch(silu_and_mul_torch(gate_up, limit), w2[expert], w2_scale[expert])
        out.index_add_(0, tokens, topk_weights[tokens, slots].unsqueeze(1) * rows.float())
    return out.to(dtype)


def fused_experts_fp8_triton(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    x_scale: Tensor | None = None, dtype: torch.dtype | None = None, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """The launches of ``moe.fused_experts`` and those that quantise rows."""

    def quantize(rows: Tensor) -> Scaled:
        if rows is x and x_scale is not None:
            return Scaled(x, x_scale)
        return Scaled(*quantize_groups_triton(rows, w13.dtype))

    return run_experts(x, Scaled(w13, w13_scale), Scaled(w2, w2_scale), topk_weights, topk_ids, quantize, dtype, limit)


def _accepts(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    x_scale: Tensor | None = None, dtype: torch.dtype | None = None, limit: float | None = None,
) -> bool:  # fmt: skip
    stacked = (w13, w13_scale, w2, w2_scale, *([x_scale] if x_scale is not None and x.shape[0] == 1 else []))
    whole = all(size % GROUP == 0 for size in (x.shape[1], w2.shape[2]))
    rows = x.dtype in FLOATS if x_scale is None else x.dtype == w13.dtype and dtype in FLOATS
    native = w13.dtype == w2.dtype == fp8_dtype(current_platform.arch) and rows and x.stride(1) == 1
    dense = all(tensor.is_contiguous() for tensor in stacked) and not is_shuffled(w13)
    return whole and native and dense and routing_fits(topk_weights, topk_ids, w13.shape[0])


fused_experts_fp8 = Op(
    "moe.fused_experts_fp8",
    aiter_impl(fused_experts_fp8_aiter, fits_fused_fp8),
    triton_impl(fused_experts_fp8_triton, _accepts),
    Impl("torch", fused_experts_fp8_torch),
)


def shuffle_experts_fp8(w13: Tensor, w2: Tensor) -> bool:
    """Shuffle loaded weights into the layout of the implementation that will run; True when they were changed."""
    return shuffle_for_aiter(fused_experts_fp8, w13, w2)
