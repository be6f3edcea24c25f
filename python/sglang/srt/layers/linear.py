"""Linear layers whose weight knows its part of the checkpoint under tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.weights import ShardId, check_shape, make_parameter


@dataclass(frozen=True)
class _Section:
    """Rows of one checkpoint matrix inside a merged weight: ``rows`` rows from ``source`` land at ``offset``."""

    full_rows: int
    source: int
    rows: int
    offset: int


def _divide(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise ValueError(f"{what} ({total}) cannot be split over {parts} tensor-parallel ranks.")
    return total // parts


class _SectionedLinear(nn.Module):
    """``x W^T`` where the rows of W are sections, each a contiguous part of one checkpoint matrix."""

    def __init__(self, in_features: int, sections: dict[ShardId, _Section], bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = sum(section.rows for section in sections.values())
        self._sections = sections
        weights = {shard: (section.full_rows, in_features) for shard, section in sections.items()}
        self.weight = make_parameter(self.out_features, in_features, loader=self.weight_loader, full_shapes=weights)
        self.bias: nn.Parameter | None = None
        if bias:
            biases = {shard: (section.full_rows,) for shard, section in sections.items()}
            self.bias = make_parameter(
                self.out_features, loader=self.weight_loader, full_shapes=biases, fill=(0.0, 0.0)
            )

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's rows of checkpoint matrix ``shard_id``; a tuple means several stacked on dim 0."""
        parts = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        tail = tuple(param.shape[1:])
        check_shape(loaded, (sum(self._sections[part].full_rows for part in parts), *tail))
        start = 0
        for part in parts:
            section = self._sections[part]
            source = loaded.narrow(0, start + section.source, section.rows)
            param.data.narrow(0, section.offset, section.rows).copy_(source)
            start += section.full_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out on this rank]."""
        return F.linear(x, self.weight, self.bias)


def _sections(widths: Sequence[int], rank: int, size: int, single: bool = False) -> dict[ShardId, _Section]:
    sections: dict[ShardId, _Section] = {}
    offset = 0
    for index, width in enumerate(widths):
        rows = _divide(width, size, "output width")
        sections[None if single else index] = _Section(width, rank * rows, rows, offset)
        offset += rows
    return sections


class ReplicatedLinear(_SectionedLinear):
    """Every rank holds the whole matrix."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, _sections([out_features], 0, 1, single=True), bias)


class MergedReplicatedLinear(_SectionedLinear):
    """Several whole matrices with one input, computed as one product; shard ids are 0, 1, …"""

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        super().__init__(in_features, _sections(out_features, 0, 1), bias)


class ColumnParallelLinear(_SectionedLinear):
    """Output rows are split over the tensor-parallel ranks; the output stays split."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        tp = get_tp_group()
        super().__init__(in_features, _sections([out_features], tp.rank, tp.size, single=True), bias)


class MergedColumnParallelLinear(_SectionedLinear):
    """Several column-parallel matrices with one input; each is split by itself. Shard ids are 0, 1, …"""

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        tp = get_tp_group()
        super().__init__(in_features, _sections(out_features, tp.rank, tp.size), bias)
        self.section_widths = [section.rows for section in self._sections.values()]


class QKVParallelLinear(_SectionedLinear):
    """Query, key and value projections as one product, split over ranks by heads.

    Shard ids "q", "k", "v". With fewer key heads than ranks each key head is held by several ranks. ``q_multiplier``
    is the width of one query head's rows in units of ``head_size`` (2 for an output gate inside q_proj).
    """

    def __init__(
        self, hidden: int, head_size: int, num_heads: int, num_kv_heads: int, q_multiplier: int = 1, bias: bool = False
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
        sections: dict[ShardId, _Section] = {
            "q": _Section(num_heads * head_size * q_multiplier, tp.rank * q_rows, q_rows, 0),
            "k": _Section(kv_full, kv_source, kv_rows, q_rows),
            "v": _Section(kv_full, kv_source, kv_rows, q_rows + kv_rows),
        }
        super().__init__(hidden, sections, bias)


class RowParallelLinear(nn.Module):
    """Input columns are split over the ranks; outputs are summed over them unless ``reduce_results`` is False."""

    def __init__(self, in_features: int, out_features: int, reduce_results: bool = True, bias: bool = False) -> None:
        super().__init__()
        self._tp = get_tp_group()
        if bias and not reduce_results:
            raise ValueError("a bias needs reduced results: it must be added once, not once a rank")
        self.reduce_results = reduce_results
        columns = _divide(in_features, self._tp.size, "input width")
        self._full_shape = (out_features, in_features)
        self.weight = make_parameter(
            out_features, columns, loader=self.weight_loader, full_shapes={None: self._full_shape}
        )
        self.bias = make_parameter(out_features, fill=(0.0, 0.0)) if bias else None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's columns."""
        check_shape(loaded, self._full_shape)
        columns = param.shape[1]
        param.data.copy_(loaded.narrow(1, self._tp.rank * columns, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in on this rank] -> [N, out]."""
        if self._tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        out = F.linear(x, self.weight)
        if self.reduce_results:
            out = self._tp.all_reduce(out)
        return out if self.bias is None else out + self.bias
