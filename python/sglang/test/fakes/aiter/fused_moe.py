"""FAKE fused mixture of experts: both products in float32 over the vendor's weight layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from aiter.errors import require
from aiter.ops.enum import ActivationType, QuantType
from aiter.ops.shuffle import unshuffled
from aiter.utility.fp4_utils import rounded, unshuffled_scale, weights_of

_ACTIVATIONS: dict[ActivationType, Callable[[torch.Tensor], torch.Tensor]] = {
    ActivationType.Silu: F.silu,
    ActivationType.Gelu: F.gelu,
}
_BLOCK = 128
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_FP4 = torch.float4_e2m1fn_x2


def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_mask: torch.Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    quant_type: QuantType = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_size_M: int | None = None,
    num_local_tokens: torch.Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of experts, [M, H] in ``dtype``; rows at and past ``num_local_tokens`` [1] are NaN.

    hidden_states [M, H], w1 [E, 2I, H] and w2 [E, H, I] shuffled, topk_ids int32 [M, K] in [0, mask length or E).
    """
    dtype = hidden_states.dtype if dtype is None else dtype
    assert dtype in (torch.float16, torch.bfloat16), f"unsupported out dtype {dtype}"
    assert activation in _ACTIVATIONS, f"no kernel for {activation}"
    plain = not doweight_stage1 and a2_scale is None and bias1 is None and bias2 is None
    if not plain or hidden_pad or intermediate_pad:
        raise NotImplementedError("the fake knows no biases, paddings, static scales or early weights")
    _check_weights(w1, w2)
    _check_routing(topk_weight, topk_ids, hidden_states.shape[0])
    live = hidden_states.shape[0] if num_local_tokens is None else _count(num_local_tokens, hidden_states.shape[0])
    local = _local_experts(topk_ids[:live], expert_mask, w1.shape[0])
    _check_distinct(local.masked_fill(topk_weight[:live] == 0, -1))
    rows = _activations(hidden_states[:live], a1_scale, quant_type, w1.dtype)
    gate_up, down = _weights(w1, w1_scale, quant_type), _weights(w2, w2_scale, quant_type)
    out = torch.zeros(live, hidden_states.shape[1])
    for expert in local[local >= 0].unique().tolist():
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        gate, up = (rows[tokens] @ gate_up[expert].t()).chunk(2, dim=-1)
        hidden = _requantized(_ACTIVATIONS[activation](gate) * up, quant_type, w1.dtype)
        out.index_add_(0, tokens, topk_weight[tokens, slots].unsqueeze(1) * (hidden @ down[expert].t()))
    result = torch.full(hidden_states.shape, torch.nan, dtype=dtype)
    result[:live] = out.to(dtype)
    return result


def _check_weights(w1: torch.Tensor, w2: torch.Tensor) -> None:
    shuffled: tuple[Any, Any] = (getattr(w1, "is_shuffled", False), getattr(w2, "is_shuffled", False))
    require(all(shuffled), "weights that are not shuffled are read in the wrong order")
    require(w1.is_contiguous() and w2.is_contiguous(), "weights must be contiguous")
    experts, hidden, width = w2.shape
    packed = 2 if w1.dtype == _FP4 else 1
    fits = w1.shape == (experts, 2 * width * packed, hidden // packed)
    require(fits, f"w1 {tuple(w1.shape)} does not fit w2 {tuple(w2.shape)}")


def _check_routing(weights: torch.Tensor, ids: torch.Tensor, rows: int) -> None:
    require(ids.dtype == torch.int32 and ids.ndim == 2 and ids.shape[0] == rows, f"ids must be int32 [{rows}, K]")
    require(
        weights.dtype == torch.float32 and weights.shape == ids.shape,
        "weights must be float32, of the same shape as the ids",
    )
    require(ids.is_contiguous() and weights.is_contiguous(), "routing must be contiguous")


def _count(num_local_tokens: torch.Tensor, rows: int) -> int:
    is_one = num_local_tokens.dtype == torch.int32 and num_local_tokens.shape == (1,)
    require(is_one, f"num_local_tokens must be int32 [1], got {num_local_tokens.dtype}")
    count = int(num_local_tokens)
    require(0 <= count <= rows, f"num_local_tokens={count} of a buffer of {rows} rows")
    return count


def _local_experts(ids: torch.Tensor, mask: torch.Tensor | None, num_local: int) -> torch.Tensor:
    """ids [n, K] -> positions in the weights, -1 where masked."""
    known = num_local if mask is None else mask.numel()
    require(bool(((ids >= 0) & (ids < known)).all()), f"ids outside [0, {known}) index past the expert counters")
    if mask is None:
        return ids.long()
    require(mask.dtype == torch.int32 and mask.ndim == 1, f"expert_mask must be int32 [E], got {mask.dtype}")
    require(int(mask.sum()) == num_local, f"expert_mask marks {int(mask.sum())} experts, the weights hold {num_local}")
    local = torch.where(mask == 1, mask.cumsum(0) - 1, -1)[ids.long()]
    # With a mask the vendor looks its kernel up for one expert fewer a token: the last column has to be a masked one.
    require(bool((local[:, -1] < 0).all()), "with expert_mask the last column of ids must name a masked expert")
    return local


def _check_distinct(local: torch.Tensor) -> None:
    """The vendor sorts through a table with one place for a token and an expert: a later entry replaces an earlier."""
    ordered = local.sort(dim=1).values
    require(not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()), "an expert twice in a row")


def _activations(x: torch.Tensor, scale: torch.Tensor | None, quant: QuantType, weight: torch.dtype) -> torch.Tensor:
    if x.dtype in _FP8:
        require(quant in (QuantType.per_128x128, QuantType.per_1x128), f"8-bit rows under {quant}")
        assert scale is not None, "a1_scale must be provided for quantized input for fused_moe"
        require(x.dtype == weight or weight not in _FP8, f"rows of {x.dtype}, weights of {weight}")
        shape = (x.shape[0], x.shape[1] // _BLOCK)
        require(scale.dtype == torch.float32 and scale[: shape[0]].shape == shape, f"a1_scale must be float32 {shape}")
        return x.float() * scale[: shape[0]].repeat_interleave(_BLOCK, 1)
    require(scale is None, "a1_scale given with rows that are not quantised")
    return _requantized(x.float(), quant, weight)


def _requantized(x: torch.Tensor, quant: QuantType, dtype: torch.dtype) -> torch.Tensor:
    """x as the second factor of a block-scaled product sees it: 8 bits by groups of 128, or 4 by groups of 32."""
    if quant is QuantType.No or not x.numel():
        return x
    if quant is QuantType.per_1x32:
        return rounded(x)
    require(dtype in _FP8, f"{quant} quantises rows to {dtype}")
    groups = x.view(x.shape[0], -1, _BLOCK)
    limit = torch.finfo(dtype).max
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / limit
    return ((groups / scale).clamp(-limit, limit).to(dtype).float() * scale).view_as(x)


def _weights(w: torch.Tensor, scale: torch.Tensor | None, quant: QuantType) -> torch.Tensor:
    if quant is QuantType.No:
        require(scale is None and w.dtype in (torch.bfloat16, torch.float16), f"{w.dtype} weights need a quant_type")
        return unshuffled(w).float()
    if quant is QuantType.per_1x32:
        return _four_bit_weights(w, scale)
    require(quant in (QuantType.per_128x128, QuantType.per_1x128), f"the fake has no {quant}")
    require(w.dtype in _FP8 and scale is not None, f"{quant} takes 8-bit weights with scales, got {w.dtype}")
    assert scale is not None
    blocks = (w.shape[0], w.shape[1] // _BLOCK, w.shape[2] // _BLOCK)
    require(scale.dtype == torch.float32 and scale.shape == blocks, f"scales must be float32 {blocks}")
    return unshuffled(w).float() * scale.repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)


def _four_bit_weights(w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Codes and scales in their layouts, which the kernels read by whole tiles."""
    require(w.dtype == _FP4 and scale is not None, f"per_1x32 takes pairs of four bits with scales, got {w.dtype}")
    assert scale is not None
    shape = (*w.shape[:2], w.shape[2] // 16)
    require(scale.dtype == torch.float8_e8m0fnu and scale.shape == shape, f"scales must be float8_e8m0fnu {shape}")
    tiled = (shape[0] * shape[1]) % 256 == 0 and shape[2] % 8 == 0
    require(tiled, f"scales {shape} are no whole tiles of 256 rows and 8 columns: those past the end are read")
    plain = unshuffled_scale(scale.reshape(-1, shape[2]).view(torch.uint8)).view(shape)
    return weights_of(unshuffled(w.view(torch.uint8)), plain)
