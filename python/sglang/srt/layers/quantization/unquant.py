"""Weights in the dtype of activations, and what every format of weights can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from sglang.kernels.ops.linear.dense import dense_linear
from sglang.kernels.ops.moe.fused_experts import fused_experts, shuffle_experts
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.configs.quantization import WeightFormat
from sglang.srt.layers.quantization.stored import leaves_of, scaled_back
from sglang.srt.layers.weights import PLAIN, Leaf, ShardedMatrix, ShardId, WeightLoader, make_parameter

# What a layer may hand to the next: rows, or rows quantised for it.
Rows: TypeAlias = torch.Tensor | QuantizedRows


class ProjectedRows(NamedTuple):
    """Rows [N, D] as they are, and multiplied by the matrix that comes next: product [N, R]."""

    rows: torch.Tensor
    product: torch.Tensor


def plain_rows(x: Rows) -> torch.Tensor:
    """The rows as they were before they were quantised."""
    if not isinstance(x, QuantizedRows):
        return x
    assert x.plain is not None, "the layer that quantised these rows did not keep them"
    return x.plain


class Place(NamedTuple):
    """The parameter ``name`` of a layer, and this rank's parts of the checkpoint's matrices that it holds."""

    layer: nn.Module
    name: str
    shards: ShardedMatrix


class WeightMethod(ABC):
    """A format of weights.

    A linear layer keeps ``weight`` [R, C]; experts keep ``w13_weight`` [E, 2I, H] and ``w2_weight`` [E, H, I]; what
    else a format needs is kept as further parameters of the layer.
    """

    # The 8-bit type, with scales by groups of 128, in which rows are multiplied; None: the model's own. A method that
    # has one takes rows that are quantised already.
    row_dtype: torch.dtype | None = None

    # The tensors in which a checkpoint may hold one matrix.
    leaves: tuple[Leaf, ...] = (PLAIN,)

    @abstractmethod
    def create_weights(self, at: Place, loader: WeightLoader | None = None, count: int | None = None) -> None:
        """Give the layer the parameter for one matrix, or for a stack of ``count``."""

    @abstractmethod
    def load_weight(
        self, at: Place, shard_id: ShardId, loaded: torch.Tensor, scale: torch.Tensor | None, index: int | None = None
    ) -> None:
        """Load this rank's part of a checkpoint matrix, given as one of ``leaves``, into matrix ``index`` of the stack.

        scale: the scale tensor of the matrix, if it has one; its leaf states the block that one scale multiplies.
        """

    @abstractmethod
    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """``x W^T + bias``: x [N, C] -> [N, R]."""

    @abstractmethod
    def apply_moe(self, layer: nn.Module, x: Rows, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``moe.fused_experts`` with the layer's weights."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Convert loaded experts to the layout of their kernel; clamped experts keep the plain layout."""


def part_of(param: nn.Parameter, index: int | None) -> torch.Tensor:
    """The matrix that ``param`` is, or the one at ``index`` of its stack."""
    return param.data if index is None else param.data[index]


def stack_shape(count: int | None, shards: ShardedMatrix) -> tuple[int, ...]:
    """Shape of a rank's matrix, or of a stack of them."""
    return (shards.rows, shards.columns) if count is None else (count, shards.rows, shards.columns)


class UnquantizedMethod(WeightMethod):
    """Weights in the dtype of activations; a checkpoint matrix in the format ``stored`` is scaled back on load.

    by_split: a single rank would keep the layer in 8 bits.
    """

    def __init__(self, stored: WeightFormat | None = None, by_split: bool = False) -> None:
        self.stored = stored
        self.leaves = (PLAIN,) if stored is None else (PLAIN, *leaves_of(stored))
        self.by_split = by_split

    def create_weights(self, at: Place, loader: WeightLoader | None = None, count: int | None = None) -> None:
        parameter = make_parameter(
            *stack_shape(count, at.shards), loader=loader, full_shapes=at.shards.full_shapes, leaves=self.leaves
        )
        at.layer.register_parameter(at.name, parameter)

    def load_weight(
        self, at: Place, shard_id: ShardId, loaded: torch.Tensor, scale: torch.Tensor | None, index: int | None = None
    ) -> None:
        target = part_of(getattr(at.layer, at.name), index)
        if scale is not None:
            assert self.stored is not None, "only a format has scales"
            loaded = scaled_back(self.stored, loaded, scale, target.device)
        at.shards.copy(target, loaded, shard_id)

    def apply(self, layer: nn.Module, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        return dense_linear(plain_rows(x), layer.weight, bias)

    def apply_moe(self, layer: nn.Module, x: Rows, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return fused_experts(plain_rows(x), layer.w13_weight, layer.w2_weight, weights, ids, layer.swiglu_limit)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.swiglu_limit is None:
            shuffle_experts(layer.w13_weight, layer.w2_weight)
