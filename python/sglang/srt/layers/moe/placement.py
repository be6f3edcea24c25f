"""Which experts, and which part of each, this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.distributed.parallel_state import get_parallel_state


@dataclass(frozen=True)
class ExpertPlacement:
    """Experts ``first .. first + count`` of ``num_experts``, and of each the ``part``-th of ``parts`` equal widths.

    ``num_shared`` more, with ids from ``num_experts`` on, follow them on every rank.
    """

    num_experts: int
    first: int
    count: int
    part: int
    parts: int
    num_shared: int = 0

    @classmethod
    def here(cls, num_experts: int, num_shared: int = 0) -> ExpertPlacement:
        """This rank's contiguous experts, or parts of them. Raises ValueError if they cannot be parted equally."""
        state = get_parallel_state()
        if num_experts % state.ep_size:
            raise ValueError(f"{num_experts} experts cannot be split over {state.ep_size} parts (--ep-size).")
        count, parts = num_experts // state.ep_size, state.world.size // state.ep_size
        rank = state.world.rank
        return cls(num_experts, rank // parts * count, count, rank % parts, parts, num_shared)

    @property
    def holds_all(self) -> bool:
        return self.count == self.num_experts

    def local_id(self, expert_id: int) -> int | None:
        """Position of an expert in this rank's weights; None where another rank holds it."""
        if expert_id >= self.num_experts:
            return expert_id - self.num_experts + self.count
        return expert_id - self.first if self.first <= expert_id < self.first + self.count else None

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Global expert ids -> positions in this rank's weights, -1 where another rank holds the expert."""
        if self.holds_all:
            return ids
        local = ids - self.first
        local = local.masked_fill((local < 0) | (local >= self.count), -1)
        if self.num_shared:
            local = torch.where(ids >= self.num_experts, ids - (self.num_experts - self.count), local)
        return local
