"""Weights as 8-bit floats with a scale for each 128x128 block, kept in the format that this machine multiplies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.kernels.ops.moe.fused_experts import is_shuffled
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8, shuffle_experts_fp8
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows, block_fp8_linear, fp8_dtype
from sglang.srt.configs.quantization import BLOCK, FP8_BLOCKS
from sglang.srt.layers.quantization.stored import FP8, OTHER_THAN_FP8, block_scales, check_format, leaves_of
from sglang.srt.layers.quantization.unquant import Place, Rows, WeightMethod, part_of, stack_shape
from sglang.srt.layers.weights import FLOATS, ShardId, WeightLoader, make_parameter
from sglang.srt.platforms import current_platform

# Deviation of a healthy dummy's entries before their scale.
DUMMY_DEVIATION = 16.0


def quantize_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [R, C] float -> 8-bit [R, C] and the scale largest(|w|) / 448 of each block [ceil(R / 128), ceil(C / 128)].

    A block of zeros has scale 1. DeepSeek-V3 report, section 3.3.2.
    """
    rows, columns = w.shape
    largest = torch.finfo(FP8).max
    padded = F.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / largest
    scale = scale.masked_fill(scale == 0, 1.0)
    q = (blocks / scale[:, None, :, None]).clamp(-largest, largest).to(FP8)
    return q.view(padded.shape)[:rows, :columns], scale


def to_fnuz(w: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers in float8_e4m3fnuz: equal bits mean half as much there, so the scale doubles.

    The bits of -0 and of NaN mean something else in FNUZ: they become 0 and NaN.
    """
    bits = w.view(torch.uint8)
    nan = (bits & 0x7F) == 0x7F
    bits = torch.where(nan, 0x80, torch.where(bits == 0x80, 0, bits)).to(torch.uint8)
    return bits.view(torch.float8_e4m3fnuz), scale * 2.0


def encode_dummy(drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """A healthy matrix of entries ``drawn`` from N(0, 16): scales make their deviation 1 / sqrt(fan_in)."""
    blocks = FP8_BLOCKS.block.entries(tuple(drawn.shape))
    scale = drawn.shape[1] ** -0.5 / DUMMY_DEVIATION
    return {"": drawn.to(FP8), FP8_BLOCKS.scale_suffix: torch.full(blocks, scale, device=drawn.device)}


class Fp8Method(WeightMethod):
    """8-bit weights; with ``on_load`` the checkpoint's are not, and each whole matrix is quantised before it is split.

    Each parameter has scales of its blocks, ``<name>_scale_inv`` (they are multiplied, despite the name).
    """

    leaves = (*leaves_of(FP8_BLOCKS), *OTHER_THAN_FP8)

    def __init__(self, on_load: bool) -> None:
        self.on_load = on_load
        self.dtype = self.row_dtype = fp8_dtype(current_platform.arch)

    def create_weights(self, at: Place, loader: WeightLoader | None = None, count: int | None = None) -> None:
        blocks = at.shards.in_blocks(FP8_BLOCKS.block)
        assert blocks is not None, "the caller asks for this format only where blocks are whole"
        weight = make_parameter(
            *stack_shape(count, at.shards), dtype=self.dtype, loader=loader, full_shapes=at.shards.full_shapes,
            fill=(0.0, DUMMY_DEVIATION), leaves=self.leaves, encode=encode_dummy,
        )  # fmt: skip
        at.layer.register_parameter(at.name, weight)
        scale = make_parameter(*stack_shape(count, blocks), dtype=torch.float32, full_shapes={})
        at.layer.register_parameter(f"{at.name}_scale_inv", scale)

    def load_weight(
        self, at: Place, shard_id: ShardId, loaded: torch.Tensor, scale: torch.Tensor | None, index: int | None = None
    ) -> None:
        target, scales = (part_of(getattr(at.layer, each), index) for each in (at.name, f"{at.name}_scale_inv"))
        blocks = at.shards.in_blocks(FP8_BLOCKS.block)
        assert blocks is not None
        loaded = loaded.to(target.device)
        if scale is None:
            check_format(loaded, FLOATS if self.on_load else (FP8,), FP8_BLOCKS.name)
            loaded, scale = quantize_blocks(loaded)
        else:
            scale = block_scales(scale, target.device)
        if self.dtype != FP8:
            loaded, scale = to_fnuz(loaded, scale)
        at.shards.copy(target, loaded, shard_id)
        blocks.copy(scales, scale, shard_id)

    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        rows, made = (x.q, (x.scale, x.dtype)) if isinstance(x, QuantizedRows) else (x, ())
        out = block_fp8_linear(rows, layer.weight, layer.weight_scale_inv, *made)
        return out if bias is None else out + bias

    def apply_moe(self, layer: nn.Module, x: Rows, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # The vendor's experts quantise rows themselves. Rows are gathered by expert: scales that are stored by
        # columns, as the library's products read them, would take a sector of memory for each row and step.
        if isinstance(x, QuantizedRows) and x.plain is not None:
            if is_shuffled(layer.w13_weight) or not x.scale.is_contiguous():
                x = x.plain
        rows, scale, dtype = (x.q, x.scale, x.dtype) if isinstance(x, QuantizedRows) else (x, None, None)
        stacks = layer.w13_weight, layer.w13_weight_scale_inv, layer.w2_weight, layer.w2_weight_scale_inv
        return fused_experts_fp8(rows, *stacks, weights, ids, scale, dtype, layer.swiglu_limit)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.swiglu_limit is None:
            shuffle_experts_fp8(layer.w13_weight, layer.w2_weight)
