"""Linear layers whose weights know their part of the checkpoint under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import ProcessGroupHandle, get_tp_group
from sglang.srt.layers.quantization import Place, ProjectedRows, Rows, linear_method
from sglang.srt.layers.weights import ShardedMatrix, ShardId, ShardSlice, make_parameter


def _divide(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise ValueError(f"{what} ({total}) cannot be split over {parts} tensor-parallel ranks.")
    return total // parts


class _ShardedLinear(nn.Module):
    """``x W^T`` where W consists of parts of checkpoint matrices.

    quant_config and prefix, the module's name in the model, decide the format of the weight; with ``dequantize`` it is
    plain, for code that reads it.
    """

    def __init__(
        self,
        sections: Mapping[ShardId, ShardSlice],
        bias: bool,
        quant_config: QuantConfig | None,
        prefix: str,
        dequantize: bool = False,
    ) -> None:
        super().__init__()
        self._shards = ShardedMatrix(sections)
        self.quant_method = linear_method(quant_config, prefix, self._shards, dequantize)
        self.quant_method.create_weights(Place(self, "weight", self._shards), self.weight_loader)
        self.bias: nn.Parameter | None = None
        if bias:
            shapes = {shard: (section.full_rows,) for shard, section in self._shards.slices.items()}
            self.bias = make_parameter(self._shards.rows, loader=self._load_bias, full_shapes=shapes, fill=(0.0, 0.0))

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None, scale: torch.Tensor | None = None
    ) -> None:
        """Load this rank's part of checkpoint matrix ``shard_id``; a tuple means several stacked on dim 0."""
        self.quant_method.load_weight(Place(self, "weight", self._shards), shard_id, loaded, scale)

    def _load_bias(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        self._shards.copy(param.data, loaded, shard_id)

    @property
    def row_dtype(self) -> torch.dtype | None:
        """The type of rows that this product wants as ``QuantizedRows``; None: it takes plain ones out of them."""
        return self.quant_method.row_dtype

    @property
    def matrix(self) -> torch.Tensor | None:
        """What a norm may multiply its rows by in place of this layer; None if that is not all that this layer does."""
        return self.weight if self.bias is None and self.row_dtype is None else None

    def forward(self, x: Rows | ProjectedRows) -> torch.Tensor:
        """x [N, in] -> [N, out on this rank]; ``ProjectedRows`` are of this layer's ``matrix``."""
        if isinstance(x, ProjectedRows):
            return x.product
        return self.quant_method.apply(self, x, self.bias)


class ColumnParallelLinear(_ShardedLinear):
    """Output rows are split over the tensor-parallel ranks; the output stays split.

    out_features: rows of the checkpoint matrix, or of each if there are several with the same input, with shard ids 0,
    1, …
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = False,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
        dequantize: bool = False,
    ) -> None:
        ranks = self._ranks()
        widths = {None: out_features} if isinstance(out_features, int) else dict(enumerate(out_features))
        sections: dict[ShardId, ShardSlice] = {}
        offset = 0
        for shard, width in widths.items():
            rows = _divide(width, ranks.size, "output width")
            sections[shard] = ShardSlice(width, in_features, ranks.rank * rows, rows, 0, in_features, offset)
            offset += rows
        super().__init__(sections, bias, quant_config, prefix, dequantize)

    def _ranks(self) -> ProcessGroupHandle:
        """The ranks that each hold a part."""
        return get_tp_group()


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel matrices with the same input, as one product; each is split separately."""


class ReplicatedLinear(ColumnParallelLinear):
    """Every rank holds the whole matrix."""

    def _ranks(self) -> ProcessGroupHandle:
        return ProcessGroupHandle()


class MergedReplicatedLinear(ReplicatedLinear):
    """Several whole matrices with one input, as one product."""


class QKVParallelLinear(_ShardedLinear):
    """Query, key and value projections as one product, split over ranks by heads.

    Shard ids "q", "k", "v". With fewer key heads than ranks each key head is held by several ranks. ``q_multiplier``
    is the width of one query head's rows in units of ``head_size`` (2 for an output gate inside q_proj).
    """

    def __init__(
        self,
        hidden: int,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        q_multiplier: int = 1,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        tp = get_tp_group()
        self.num_heads = _divide(num_heads, tp.size, "number of query heads")
        if num_kv_heads >= tp.size:
            self.num_kv_heads = _divide(num_kv_heads, tp.size, "number of key heads")
            first_kv_head = tp.rank * self.num_kv_heads
        else:
            replicas = _divide(tp.size, num_kv_heads, "number of ranks (with fewer key heads)")
            self.num_kv_heads, first_kv_head = 1, tp.rank // replicas
        q_rows = self.num_heads * head_size * q_multiplier
        kv_rows = self.num_kv_heads * head_size
        kv_full, kv_source = num_kv_heads * head_size, first_kv_head * head_size
        self.q_width, self.kv_width = q_rows, kv_rows
        q_full = num_heads * head_size * q_multiplier
        sections: dict[ShardId, ShardSlice] = {
            "q": ShardSlice(q_full, hidden, tp.rank * q_rows, q_rows, 0, hidden, 0),
            "k": ShardSlice(kv_full, hidden, kv_source, kv_rows, 0, hidden, q_rows),
            "v": ShardSlice(kv_full, hidden, kv_source, kv_rows, 0, hidden, q_rows + kv_rows),
        }
        super().__init__(sections, False, quant_config, prefix)


class RowParallelLinear(_ShardedLinear):
    """Input columns are split over the ranks; outputs are summed over them unless ``reduce_results`` is False."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        reduce_results: bool = True,
        bias: bool = False,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        if bias and not reduce_results:
            raise ValueError("a bias needs reduced results: it must be added once, not once per rank")
        tp = get_tp_group()
        columns = _divide(in_features, tp.size, "input width")
        section = ShardSlice(out_features, in_features, 0, out_features, tp.rank * columns, columns)
        super().__init__({None: section}, bias, quant_config, prefix)
        self._tp = tp
        self.reduce_results = reduce_results

    def forward(self, x: Rows) -> torch.Tensor:
        """x [N, in on this rank] -> [N, out]."""
        if self._tp.size == 1:
            return super().forward(x)
        out = self.quant_method.apply(self, x, None)
        if self.reduce_results:
            out = self._tp.all_reduce(out)
        return out if self.bias is None else out + self.bias
