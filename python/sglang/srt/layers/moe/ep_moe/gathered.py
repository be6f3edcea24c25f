"""Routed experts under attention data parallelism without an exchange by routing: all ranks see all rows."""

from __future__ import annotations

import torch

from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed import get_parallel_state
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.capacity import slice_of
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class GatheredMoE(FusedMoE):
    """Each rank brings its slice of its attention group's rows, computes its experts for all, and the sums are shared.

    The result is a part of a sum over the attention group.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        top_k: int,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
        num_shared: int = 0,
    ) -> None:
        super().__init__(num_experts, hidden, intermediate, top_k, False, quant_config, prefix, num_shared)
        self._world = get_parallel_state().world

    def forward(self, x: torch.Tensor, topk: TopKOutput, fb: ForwardBatch | None = None) -> torch.Tensor:
        """x [N, H], topk as FusedMoE's, alike in all groups -> new [N, H]: zero except this rank's slice of rows."""
        self.check_columns(topk)
        groups = None if fb is None else fb.rows_of_groups
        if fb is None or groups is None:
            raise RuntimeError("attention groups exchange rows only in a step that says how many each brings")
        # Equal shares of the longest group: every rank brings as many rows, the missing ones without experts.
        share = -(-max(groups) // self._tp.size)
        first, end = slice_of(max(groups), self._tp.rank, self._tp.size)
        first, end = min(first, x.shape[0]), min(end, x.shape[0])
        real = torch.arange(x.shape[0], device=x.device) < fb.num_token_non_padded
        ids = topk.ids.masked_fill(~real.unsqueeze(1), -1)
        rows = x.new_zeros(share, x.shape[1])
        rows[: end - first] = x[first:end]
        all_ids = ids.new_full((share, ids.shape[1]), -1)
        all_ids[: end - first] = ids[first:end]
        weights = topk.weights.new_zeros(all_ids.shape)
        weights[: end - first] = topk.weights[first:end]
        gathered = [self._world.all_gather(part, dim=0) for part in (rows, weights, all_ids)]
        sums = self._world.all_reduce(self.run_experts(gathered[0], gathered[1], self.placement.local_ids(gathered[2])))
        out = torch.zeros_like(x)
        out[first:end] = sums.narrow(0, self._world.rank * share, end - first)
        return out
