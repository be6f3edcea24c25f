"""Routed experts under attention data parallelism without an exchange by routing: all ranks see all rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.capacity import slice_of
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class GatheredMoE(FusedMoE):
    """Gathers the ranks' slices, computes this rank's experts for all rows, and sums: a part of the group's result."""

    rows_travel = True

    def forward(self, x: torch.Tensor, topk: TopKOutput, forward_batch: ForwardBatch | None = None) -> torch.Tensor:
        """x [N, H], topk as FusedMoE's, alike in all groups -> new [N, H]: zero except this rank's slice of rows."""
        self.check_columns(topk)
        groups = None if forward_batch is None else forward_batch.rows_of_groups
        if forward_batch is None or groups is None:
            raise RuntimeError(
                "attention groups exchange rows only in a step whose metadata contains the number of rows of each group"
            )
        tp, world = self.ranks.tp, self.ranks.world
        # Every rank sends the same number of rows, by the longest group; missing rows have no experts.
        share = -(-max(groups) // tp.size)
        mine = slice(*(min(edge, x.shape[0]) for edge in slice_of(max(groups), tp.rank, tp.size)))
        real = torch.arange(x.shape[0], device=x.device) < forward_batch.num_token_non_padded
        ids = topk.ids.masked_fill(~real.unsqueeze(1), -1)
        missing = (0, 0, 0, share - len(x[mine]))
        parts = (F.pad(x[mine], missing), F.pad(topk.weights[mine], missing), F.pad(ids[mine], missing, value=-1))
        rows, weights, all_ids = (world.all_gather(part, dim=0) for part in parts)
        sums = world.all_reduce(self.run_experts(rows, weights, self.placement.local_ids(all_ids)))
        out = torch.zeros_like(x)
        out[mine] = sums.narrow(0, world.rank * share, len(x[mine]))
        return out
