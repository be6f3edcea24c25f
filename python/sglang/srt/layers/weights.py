"""How a parameter takes its part of a checkpoint tensor, and what a random fill of it looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from sglang.srt.configs.quantization import BlockShape
from sglang.srt.distributed.parallel_state import ProcessGroupHandle

# None for a parameter that is one checkpoint tensor; an index, a name or a tuple of indices for a merged one.
ShardId = int | str | tuple[int, ...] | None
# (parameter, checkpoint tensor, shard id), and the tensor's partner where it came with one.
WeightLoader = Callable[..., None]
# From a matrix of a dummy checkpoint to the tensors that stand for it, by suffix.
Encoder = Callable[[torch.Tensor], dict[str, torch.Tensor]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Leaf:
    """One tensor that a checkpoint may hold of a matrix, named as the matrix and ``suffix``, in one of ``dtypes``.

    block: what of the matrix an entry stands for. partner: suffix of the leaf that must come with it. ids_below: it
    holds integers in [0, ids_below). Of leaves with one suffix the tensor's dtype chooses.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    block: BlockShape = BlockShape(1, 1)
    partner: str | None = None
    ids_below: int | None = None


PLAIN = Leaf("", FLOATS)


class WeightFormatError(ValueError):
    """A checkpoint tensor is in another format than the model asks for."""


class WeightShapeError(ValueError):
    """A checkpoint tensor has another shape than the model asks for."""


def check_shape(loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise WeightShapeError unless ``loaded`` has exactly the shape ``expected``."""
    if tuple(loaded.shape) != tuple(expected):
        raise WeightShapeError(f"expected shape {list(expected)}, found {list(loaded.shape)}")


@dataclass(frozen=True)
class ShardSlice:
    """A rank's part of one checkpoint matrix: ``rows`` x ``columns`` from (row, column), to land at row ``offset``."""

    full_rows: int
    full_columns: int
    row: int
    rows: int
    column: int
    columns: int
    offset: int = 0


class ShardedMatrix:
    """Which parts of which checkpoint matrices, by shard id, make up a rank's weight [rows, columns]."""

    def __init__(self, slices: Mapping[ShardId, ShardSlice]) -> None:
        self.slices = dict(slices)
        *_, last = self.slices.values()
        self.rows = last.offset + last.rows
        self.columns = last.columns

    @property
    def full_shapes(self) -> dict[ShardId, tuple[int, ...]]:
        """Shape of each checkpoint matrix."""
        return {shard: (part.full_rows, part.full_columns) for shard, part in self.slices.items()}

    def is_split_in_blocks(self, block: BlockShape) -> bool:
        """True when blocks are cut by the split over ranks alone."""
        whole = {
            shard: ShardSlice(part.full_rows, part.full_columns, 0, part.full_rows, 0, part.full_columns)
            for shard, part in self.slices.items()
        }
        return self.in_blocks(block) is None and ShardedMatrix(whole).in_blocks(block) is not None

    def copy(self, target: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of ``loaded`` into ``target`` [rows, columns], or of a vector into [rows].

        A tuple of ids means several matrices stacked on dim 0.
        """
        parts = [self.slices[part] for part in (shard_id if isinstance(shard_id, tuple) else (shard_id,))]
        full = (sum(part.full_rows for part in parts), parts[0].full_columns)
        check_shape(loaded, full[: target.ndim])
        start = 0
        for part in parts:
            source = loaded.narrow(0, start + part.row, part.rows)
            if target.ndim == 2:
                source = source.narrow(1, part.column, part.columns)
            target.narrow(0, part.offset, part.rows).copy_(source)
            start += part.full_rows

    def in_blocks(self, block: BlockShape) -> ShardedMatrix | None:
        """The same parts counted in blocks, of which the last may be cut; None unless cut at edges of blocks."""
        slices = list(self.slices.values())
        rows = [part.full_rows for part in slices[:-1]] + [cut for part in slices for cut in (part.row, part.offset)]
        columns = [cut for part in slices for cut in (part.column, part.columns)]
        if any(cut % block.rows for cut in rows) or any(cut % block.columns for cut in columns):
            return None
        sizes = (block.rows, block.columns, block.rows, block.rows, block.columns, block.columns, block.rows)

        def count(part: ShardSlice) -> ShardSlice:
            return ShardSlice(*(-(-number // size) for number, size in zip(astuple(part), sizes, strict=True)))

        return ShardedMatrix({shard: count(part) for shard, part in self.slices.items()})


def load_whole(param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
    """Copy ``loaded`` into ``param`` (cast to its dtype); shapes must agree."""
    check_shape(loaded, tuple(param.shape))
    param.data.copy_(loaded)


def make_parameter(
    *shape: int,
    dtype: torch.dtype | None = None,
    loader: WeightLoader | None = None,
    full_shapes: Mapping[ShardId, tuple[int, ...]] | None = None,
    fill: tuple[float, float] | None = None,
    leaves: tuple[Leaf, ...] = (PLAIN,),
    encode: Encoder | None = None,
) -> nn.Parameter:
    """An uninitialised inference parameter of ``shape`` that knows how it is loaded.

    dtype: default is torch's default dtype, which the model loader sets. full_shapes: shape of each checkpoint tensor
    by shard id, before tensor parallelism; by default the parameter's own; empty when the checkpoint holds none. fill:
    mean and standard deviation of the dummy filler; by default 0 and 1/sqrt(fan_in) for matrices; a vector must say its
    own. leaves: the tensors in which a checkpoint may hold it; a partner is the loader's last argument. encode: what a
    dummy checkpoint holds of it; by default the random numbers themselves.
    """
    param: Any = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    if fill is None and len(shape) < 2:
        raise ValueError("a vector parameter must state how a dummy checkpoint fills it")
    param.weight_loader = loader or load_whole
    param.full_shapes = dict(full_shapes) if full_shapes is not None else {None: tuple(shape)}
    param.fill = fill
    param.leaves = leaves
    param.encode = encode
    return param


def make_split_vector(
    length: int, ranks: ProcessGroupHandle, dtype: torch.dtype | None = None, *, fill: tuple[float, float]
) -> nn.Parameter:
    """A parameter with this rank's part of a vector of ``length``, in order of ``ranks``, which divide it."""
    own = length // ranks.size

    def load(param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        check_shape(loaded, (length,))
        param.data.copy_(loaded.narrow(0, ranks.rank * own, own))

    return make_parameter(own, dtype=dtype, loader=load, full_shapes={None: (length,)}, fill=fill)


def full_shape(param: nn.Parameter, shard_id: ShardId) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds ``shard_id`` of ``param``; a tuple of ids is stacked on dim 0."""
    shapes: Mapping[ShardId, tuple[int, ...]] = param.full_shapes  # type: ignore[attr-defined]
    if isinstance(shard_id, tuple):
        parts = [shapes[part] for part in shard_id]
        return (sum(part[0] for part in parts), *parts[0][1:])
    return shapes[shard_id]


def join_rows(*params: nn.Parameter) -> torch.Tensor:
    """Make ``params`` [rows, K] the first rows of one new matrix [R, K], for one product; R is a multiple of 8.

    Rows of zeros fill it up: libraries are slow to write rows that no 16 bytes align.
    """
    rows = [param.shape[0] for param in params]
    joined = params[0].data.new_zeros(-(-sum(rows) // 8) * 8, params[0].shape[1])
    for param, part in zip(params, joined.split([*rows, len(joined) - sum(rows)]), strict=False):
        param.data = part
    return joined
