"""Routed experts in MXFP4: four bits per weight in memory, as the checkpoint has them."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.moe.fused_experts_mxfp4 import fused_experts_mxfp4, shuffle_experts_mxfp4
from sglang.kernels.ops.quant.mxfp4 import quantize_mxfp4
from sglang.srt.configs.quantization import WeightFormat
from sglang.srt.layers.quantization.stored import CODES, OTHER_THAN_MXFP4, PAIRS, check_format, leaves_of, mxfp4_parts
from sglang.srt.layers.quantization.unquant import Place, Rows, WeightMethod, part_of, plain_rows, stack_shape
from sglang.srt.layers.weights import ShardedMatrix, ShardId, WeightLoader, make_parameter


class Mxfp4Method(WeightMethod):
    """Codes [E, R, C / 2] and, for each parameter, ``<name>_scale``: scales [E, R, C / 32], all uint8.

    Rows of activations stay as they are, but where AITER runs a checkpoint that was made for rows in MXFP4. For routed
    experts alone: other matrices are made plain while they load.
    """

    def __init__(self, known: WeightFormat) -> None:
        self.format = known
        self._activation_dtype = torch.get_default_dtype()
        self.leaves = (*leaves_of(known), *OTHER_THAN_MXFP4)

    def create_weights(self, at: Place, loader: WeightLoader | None = None, count: int | None = None) -> None:
        pairs, blocks = self._parts(at.shards)
        weight = make_parameter(
            *stack_shape(count, pairs), dtype=torch.uint8, loader=loader, full_shapes=at.shards.full_shapes,
            leaves=self.leaves, encode=self._encode,
        )  # fmt: skip
        at.layer.register_parameter(at.name, weight)
        scale = make_parameter(*stack_shape(count, blocks), dtype=torch.uint8, full_shapes={})
        at.layer.register_parameter(f"{at.name}_scale", scale)

    def _parts(self, shards: ShardedMatrix) -> tuple[ShardedMatrix, ShardedMatrix]:
        """The rank's part counted in bytes of codes, and in scales."""
        pairs, blocks = shards.in_blocks(PAIRS), shards.in_blocks(self.format.block)
        assert pairs is not None and blocks is not None, "the caller asks for this format only where blocks are whole"
        return pairs, blocks

    def _encode(self, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale = quantize_mxfp4(drawn)
        return {"": codes, self.format.scale_suffix: scale}

    def load_weight(
        self, at: Place, shard_id: ShardId, loaded: torch.Tensor, scale: torch.Tensor | None, index: int | None = None
    ) -> None:
        check_format(loaded, CODES, self.format.name)
        assert scale is not None, "codes come with their scales"
        pairs, blocks = self._parts(at.shards)
        codes, exponents = mxfp4_parts(loaded, scale)
        pairs.copy(part_of(getattr(at.layer, at.name), index), codes, shard_id)
        blocks.copy(part_of(getattr(at.layer, f"{at.name}_scale"), index), exponents, shard_id)

    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError("MXFP4 is a format of routed experts")

    def apply_moe(self, layer: nn.Module, x: Rows, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        stacks = layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale
        return fused_experts_mxfp4(plain_rows(x), *stacks, weights, ids, layer.swiglu_limit)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        # AITER rounds rows to MXFP4, which is right only where the checkpoint was made for that.
        rounds_rows = self.format.four_bit_rows and layer.swiglu_limit is None
        stacks = layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale
        shuffle_experts_mxfp4(*stacks, rounds_rows, self._activation_dtype)
