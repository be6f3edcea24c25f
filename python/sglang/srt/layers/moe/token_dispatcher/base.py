"""What a transport of tokens between expert ranks is: its configuration, what it delivers, and its rules.

Rules that every transport keeps (MORI's, made checkable):
- A token goes once to each rank that holds one of its experts, with all its ids and weights. Ids stay global; expert
  ``id`` lives on rank ``id // num_experts_per_rank``; ids outside ``[0, E)`` go nowhere.
- Received rows are ``[0, total_recv)`` of buffers that the transport owns and reuses; what is beyond is stale.
- Combine sums, without weights and in float32, what a token's ranks computed, in ascending rank order.
- Each method is a collective: all ranks call the same sequence, also with no rows.
- Between a send and its recv nothing may be read, and the caller's tensors stay alive. One send at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sglang.srt.layers.moe.token_dispatcher.capacity import recv_capacity


class ExchangeConfigError(ValueError):
    """Settings that this exchange cannot serve, or would answer wrongly."""


class DispatchError(RuntimeError):
    """An exchange that would lose or overwrite rows, or calls in a wrong order."""


@dataclass(frozen=True)
class EpConfig:
    """Sizes of one exchange; names are MORI's where it has them.

    data_type: of dispatched rows; combine_type: of combined ones. scale_dim float32 scales go with each row.
    max_total_recv_tokens: rows allocated for what arrives, 0 for the worst case. two_phase: rows travel while the
    caller computes between a send and its recv. combine_wire: MORI's codec of rows on the way back. rows_by_source:
    combine writes by source, at ``rank * max_num_inp_token_per_rank + row`` of the buffers that a cap would shorten, so
    that none may be set (capacity.source_limit).
    """

    rank: int
    world_size: int
    hidden_dim: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    data_type: torch.dtype
    combine_type: torch.dtype
    scale_dim: int = 0
    max_total_recv_tokens: int = 0
    two_phase: bool = False
    combine_wire: str = "none"
    rows_by_source: bool = False

    def __post_init__(self) -> None:
        sizes = (self.world_size, self.hidden_dim, self.max_num_inp_token_per_rank, self.num_experts_per_rank)
        if min(*sizes, self.num_experts_per_token) < 1 or not 0 <= self.rank < self.world_size:
            raise ExchangeConfigError(f"sizes must be positive and the rank inside the world: {self}")
        worst = self.world_size * self.max_num_inp_token_per_rank
        if not 0 <= self.max_total_recv_tokens <= worst:
            raise ExchangeConfigError(f"max_total_recv_tokens={self.max_total_recv_tokens} must be 0 or in 1..{worst}")
        if self.rows_by_source and self.max_recv < worst:
            raise ExchangeConfigError(
                f"combine by source needs {worst} rows of buffer, max_total_recv_tokens={self.max_total_recv_tokens} "
                f"leaves {self.max_recv}: lower max_num_inp_token_per_rank instead"
            )

    @property
    def max_recv(self) -> int:
        """Rows of the receive buffers."""
        return recv_capacity(self.world_size, self.max_num_inp_token_per_rank, self.max_total_recv_tokens)

    def least_cap(self, rows_of_ranks: Sequence[int]) -> int:
        """The smallest receive cap, a multiple of W, under which ranks that bring these rows need one round."""
        if self.rows_by_source:
            return self.world_size * max(rows_of_ranks)
        return -(-sum(rows_of_ranks) // self.world_size) * self.world_size

    @property
    def num_experts(self) -> int:
        return self.world_size * self.num_experts_per_rank

    def check_input(self, sent: SendBatch) -> None:
        """Raise ValueError unless these rows may be dispatched."""
        x, weights, scales, indices, _ = sent
        rows, k = x.shape[0], self.num_experts_per_token
        if rows > self.max_num_inp_token_per_rank:
            raise ValueError(
                f"{rows} rows to dispatch, but the limit is {self.max_num_inp_token_per_rank}: raise "
                "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK (or the receive cap, if one is set), or send fewer rows"
            )
        if x.dtype != self.data_type or (scales is None) != (self.scale_dim == 0):
            raise ValueError(f"expected {self.data_type} rows with {self.scale_dim} scales, got {x.dtype}")
        if tuple(indices.shape) != (rows, k) or tuple(weights.shape) != (rows, k) or indices.dtype != torch.int32:
            raise ValueError(f"expected int32 ids and weights [{rows}, {k}], got {list(indices.shape)} {indices.dtype}")


class SendBatch(NamedTuple):
    """Rows to dispatch. ``rows_of_ranks``, where all ranks know it: what each brings; then no device memory is read."""

    hidden: torch.Tensor  # [T, H] data_type
    weights: torch.Tensor  # [T, K] float32
    scales: torch.Tensor | None  # [T, scale_dim]
    indices: torch.Tensor  # [T, K] int32, global expert ids
    rows_of_ranks: Sequence[int] | None = None


class RecvBatch(NamedTuple):
    """What arrived: views of storage that the transport owns, overwritten by its next dispatch."""

    hidden: torch.Tensor  # [R, H] data_type
    weights: torch.Tensor  # [R, K] float32
    scales: torch.Tensor | None  # [R, scale_dim]
    indices: torch.Tensor  # [R, K] int32, global expert ids
    total_recv: torch.Tensor  # [1] int32, on the device


class EpTransport(Protocol):
    """Moves rows to the ranks of their experts and back; the module's text has the rules."""

    config: EpConfig

    def describe(self) -> str:
        """One line for the log and /server_info."""
        ...

    def dispatch_send(self, sent: SendBatch) -> RecvBatch:
        """Send rows; what arrives is not valid yet."""
        ...

    def dispatch_recv(self) -> None:
        """Afterwards the batch that ``dispatch_send`` returned is valid, until the next one."""
        ...

    def combine_send(self, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Send back the results y [>= total_recv, H] of received rows, by the dispatched ids [T, K] -> [limit, H]."""
        ...

    def combine_recv(self) -> None:
        """Afterwards the first T rows that ``combine_send`` returned hold the sums."""
        ...
