"""The routed experts as one layer: stacked weights, their loading, and the expert product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_parallel_state
from sglang.srt.layers.moe.placement import ExpertPlacement
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.quantization import Place, Rows, experts_method
from sglang.srt.layers.weights import ShardedMatrix, ShardSlice
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Checkpoint names of the three matrices of an expert, and of their stacked forms.
EXPERT_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class FusedMoE(nn.Module):
    """``num_experts`` gated feed-forward experts, of which this rank holds its placement's part.

    The result is this rank's part of a sum over its tensor-parallel group. hidden: H. intermediate: I of one expert.
    top_k: experts per token. quant_config and prefix, the module's name in the model, decide the format of the weights.
    num_shared: additional shared experts after them, all on every rank.
    """

    # Bound of the activation's gate and up parts; None: they are not clamped.
    swiglu_limit: float | None = None
    # Whether rows go to other ranks, and so must come plain.
    rows_travel = False

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
        super().__init__()
        self.ranks = get_parallel_state()
        self.placement = ExpertPlacement.here(num_experts, num_shared)
        parts = self.placement.parts
        if intermediate % parts:
            raise ValueError(f"expert width {intermediate} cannot be split over {parts} tensor-parallel ranks.")
        self.num_experts, self.num_shared = num_experts, num_shared
        self.hidden, self.intermediate = hidden, intermediate
        self.top_k = top_k
        width = intermediate // parts
        start = self.placement.part * width
        rows = [ShardSlice(intermediate, hidden, start, width, 0, hidden, offset) for offset in (0, width)]
        self._shards = {
            "w13_weight": ShardedMatrix(dict(zip(("w1", "w3"), rows, strict=True))),
            "w2_weight": ShardedMatrix({"w2": ShardSlice(hidden, intermediate, 0, hidden, start, width)}),
        }
        self.quant_method = experts_method(quant_config, prefix, list(self._shards.values()))
        for name, shards in self._shards.items():
            self.quant_method.create_weights(Place(self, name, shards), count=self.placement.count + num_shared)

    def load_expert(self, name: str, expert_id: int, tensor: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Load "w1" (gate), "w3" (up) [I, H] or "w2" (down) [H, I] of an expert of this rank, and its scales."""
        stack = "w2_weight" if name == "w2" else "w13_weight"
        local = self.placement.local_id(expert_id)
        if local is not None:
            self.quant_method.load_weight(Place(self, stack, self._shards[stack]), name, tensor, scale, local)

    def expert_tensors(self) -> Iterator[tuple[str, str, int, nn.Parameter]]:
        """Checkpoint tensors one expert at a time: name below this module, matrix, expert, and where it goes."""
        for expert_id in range(self.num_experts):
            for name, leaf in EXPERT_LEAVES.items():
                param = self.w2_weight if name == "w2" else self.w13_weight
                yield f"{expert_id}.{leaf}.weight", name, expert_id, param

    def fused_tensors(self) -> dict[str, list[list[str]]]:
        """Stacked checkpoint tensors "gate_up_proj" [E, 2I, H] and "down_proj" [E, H, I]: what each holds by expert."""
        return {
            stacked: [[f"{i}.{EXPERT_LEAVES[part]}.weight" for part in parts] for i in range(self.num_experts)]
            for stacked, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
        }

    @property
    def row_dtype(self) -> torch.dtype | None:
        """As a linear layer's."""
        return None if self.rows_travel else self.quant_method.row_dtype

    def forward(self, x: Rows, topk: TopKOutput, forward_batch: ForwardBatch | None = None) -> torch.Tensor:
        """x [N, H] (not changed), topk with k = ``top_k``, or plus all shared experts -> new [N, H]: weighted sum.

        ``forward_batch``, the step, is for experts that exchange tokens between ranks.
        """
        self.check_columns(topk)
        return self.run_experts(x, topk.weights, self.placement.local_ids(topk.ids))

    def check_columns(self, topk: TopKOutput) -> None:
        """Raise ValueError for another number of experts per token than this layer takes."""
        if topk.ids.shape[1] not in (self.top_k, self.top_k + self.num_shared):
            raise ValueError(
                f"expected {self.top_k} experts per token, or {self.num_shared} shared ones besides, got "
                f"{topk.ids.shape[1]}"
            )

    def run_experts(self, x: Rows, weights: torch.Tensor, local_ids: torch.Tensor) -> torch.Tensor:
        """Weighted sum over this rank's experts. x [N, H], weights [N, k] float32, local_ids [N, k] int32, -1: none."""
        return self.quant_method.apply_moe(self, x, weights, local_ids)
