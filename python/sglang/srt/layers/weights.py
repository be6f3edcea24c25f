"""How a parameter takes its part of a checkpoint tensor, and what a random fill of it looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

# None for a parameter that is one checkpoint tensor; an index, a name or a tuple of indices for a merged one.
ShardId = int | str | tuple[int, ...] | None
WeightLoader = Callable[[nn.Parameter, torch.Tensor, ShardId], None]


class WeightShapeError(ValueError):
    """A checkpoint tensor has another shape than the model asks for."""

    def __init__(self, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        super().__init__(f"expected shape {list(expected)}, found {list(found)}")
        self.expected = expected
        self.found = found


def check_shape(loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise WeightShapeError unless ``loaded`` has exactly the shape ``expected``."""
    if tuple(loaded.shape) != tuple(expected):
        raise WeightShapeError(tuple(expected), tuple(loaded.shape))


def load_whole(param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
    """Copy ``loaded`` into ``param`` (cast to its dtype); shapes must agree."""
    check_shape(loaded, tuple(param.shape))
    param.data.copy_(loaded)


def make_parameter(
    *shape: int,
    dtype: torch.dtype | None = None,
    loader: WeightLoader = load_whole,
    full_shapes: Mapping[ShardId, tuple[int, ...]] | None = None,
    fill: tuple[float, float] | None = None,
) -> nn.Parameter:
    """An uninitialised inference parameter of ``shape`` that knows how it is loaded.

    dtype: default is torch's default dtype, which the model loader sets. full_shapes: shape of each checkpoint tensor
    by shard id, before tensor parallelism; by default the parameter's own. fill: mean and standard deviation of the
    dummy filler; by default 0 and 1/sqrt(fan_in) for matrices. A vector must say its own.
    """
    param: Any = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    if fill is None and len(shape) < 2:
        raise ValueError("a vector parameter must say how a dummy checkpoint fills it")
    param.weight_loader = loader
    param.full_shapes = dict(full_shapes) if full_shapes is not None else {None: tuple(shape)}
    param.fill = fill
    return param


def full_shape(param: nn.Parameter, shard_id: ShardId) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds ``shard_id`` of ``param``; a tuple of ids is stacked on dim 0."""
    shapes: Mapping[ShardId, tuple[int, ...]] = param.full_shapes  # type: ignore[attr-defined]
    if isinstance(shard_id, tuple):
        parts = [shapes[part] for part in shard_id]
        return (sum(part[0] for part in parts), *parts[0][1:])
    return shapes[shard_id]
