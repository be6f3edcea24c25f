"""The routed experts as one layer: stacked weights, their loading, and the expert product."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sglang.kernels.ops.moe.fused_experts import fused_experts
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.moe.placement import ExpertPlacement
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.weights import check_shape, make_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Checkpoint names of the three matrices of an expert, and of their stacked forms.
EXPERT_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
ExpertTensor = tuple[str, tuple[int, ...], Callable[[torch.Tensor], None]]


class FusedMoE(nn.Module):
    """``num_experts`` gated feed-forward experts, of which this rank holds its placement's part.

    hidden: H. intermediate: I of one expert. top_k: experts a token. reduce_results: sum over the tensor-parallel ranks
    at the end; otherwise the result is this rank's part of that sum.
    """

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, top_k: int, reduce_results: bool = True
    ) -> None:
        super().__init__()
        self._tp = get_tp_group()
        self.placement = ExpertPlacement.here(num_experts)
        parts = self.placement.parts
        if intermediate % parts:
            raise ValueError(f"expert width {intermediate} cannot be split over {parts} tensor-parallel ranks.")
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.top_k = top_k
        self.reduce_results = reduce_results
        self.width = intermediate // parts
        self.w13_weight = make_parameter(self.placement.count, 2 * self.width, hidden)
        self.w2_weight = make_parameter(self.placement.count, hidden, self.width)

    def load_expert(self, name: str, expert_id: int, tensor: torch.Tensor) -> None:
        """Take matrix ``name`` of one expert: "w1" (gate) and "w3" (up) [I, H], "w2" (down) [H, I].

        A matrix of an expert that another rank holds is checked and left.
        """
        full = (self.hidden, self.intermediate) if name == "w2" else (self.intermediate, self.hidden)
        check_shape(tensor, full)
        if not self.placement.holds(expert_id):
            return
        start, local = self.placement.part * self.width, expert_id - self.placement.first
        if name == "w2":
            self.w2_weight.data[local].copy_(tensor.narrow(1, start, self.width))
            return
        offset = 0 if name == "w1" else self.width
        self.w13_weight.data[local].narrow(0, offset, self.width).copy_(tensor.narrow(0, start, self.width))

    def load_fused(self, name: str, tensor: torch.Tensor) -> None:
        """Take all experts at once: "gate_up_proj" [E, 2I, H] (gate rows first) or "down_proj" [E, H, I]."""
        check_shape(tensor, self._fused_shape(name))
        for expert_id in range(self.num_experts):
            if name == "down_proj":
                self.load_expert("w2", expert_id, tensor[expert_id])
            else:
                self.load_expert("w1", expert_id, tensor[expert_id, : self.intermediate])
                self.load_expert("w3", expert_id, tensor[expert_id, self.intermediate :])

    def expert_tensors(self) -> Iterator[ExpertTensor]:
        """Checkpoint tensors one expert at a time: name below this module, shape, and how it is loaded."""
        for expert_id in range(self.num_experts):
            for name, leaf in EXPERT_LEAVES.items():
                shape = (self.hidden, self.intermediate) if name == "w2" else (self.intermediate, self.hidden)

                def load(tensor: torch.Tensor, name: str = name, expert_id: int = expert_id) -> None:
                    self.load_expert(name, expert_id, tensor)

                yield f"{expert_id}.{leaf}.weight", shape, load

    def fused_tensors(self) -> Iterator[tuple[str, tuple[str, ...], Callable[[torch.Tensor], None]]]:
        """Stacked checkpoint tensors: name below this module, the per-expert names it stands for, and its loader."""
        for name, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            covered = tuple(f"{i}.{EXPERT_LEAVES[part]}.weight" for i in range(self.num_experts) for part in parts)

            def load(tensor: torch.Tensor, name: str = name) -> None:
                self.load_fused(name, tensor)

            yield name, covered, load

    def _fused_shape(self, name: str) -> tuple[int, ...]:
        if name == "down_proj":
            return self.num_experts, self.hidden, self.intermediate
        return self.num_experts, 2 * self.intermediate, self.hidden

    def forward(self, x: torch.Tensor, topk: TopKOutput, fb: ForwardBatch | None = None) -> torch.Tensor:
        """x [N, H] (left as it is), topk with k = ``top_k`` -> new [N, H]: the weighted sum of the experts' outputs.

        ``fb``, the step, is for experts that exchange tokens between ranks.
        """
        if topk.ids.shape[1] != self.top_k:
            raise ValueError(f"expected {self.top_k} experts a token, got {topk.ids.shape[1]}")
        out = self.run_experts(x, topk.weights, self.placement.local_ids(topk.ids))
        return self._tp.all_reduce(out) if self.reduce_results else out

    def run_experts(self, x: torch.Tensor, weights: torch.Tensor, local_ids: torch.Tensor) -> torch.Tensor:
        """Weighted sum over this rank's experts. x [N, H], weights [N, k] float32, local_ids [N, k] int32, -1: none."""
        return fused_experts(x, self.w13_weight, self.w2_weight, weights, local_ids)
