"""Which experts, and which part of each, this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.distributed import get_parallel_state


@dataclass(frozen=True)
class ExpertPlacement:
    """Experts ``first .. first + count`` of ``num_experts``, and of each the ``part``-th of ``parts`` equal widths."""

    num_experts: int
    first: int
    count: int
    part: int
    parts: int

    @classmethod
    def here(cls, num_experts: int) -> ExpertPlacement:
        """This rank's share: contiguous blocks of experts over runs of ranks, widths inside a run.

        Raises ValueError when the experts cannot be parted equally.
        """
        state = get_parallel_state()
        if num_experts % state.ep_size:
            raise ValueError(f"{num_experts} experts cannot be split over {state.ep_size} parts (--ep-size).")
        count, parts = num_experts // state.ep_size, state.world.size // state.ep_size
        return cls(num_experts, state.world.rank // parts * count, count, state.world.rank % parts, parts)

    @property
    def holds_all(self) -> bool:
        return self.count == self.num_experts

    def holds(self, expert_id: int) -> bool:
        return self.first <= expert_id < self.first + self.count

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Global expert ids -> positions in this rank's weights, -1 where another rank holds the expert."""
        if self.holds_all:
            return ids
        local = ids - self.first
        return local.masked_fill((local < 0) | (local >= self.count), -1)
