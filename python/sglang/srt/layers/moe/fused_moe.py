"""The routed experts as one layer: stacked weights, their loading, and the expert product."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sglang.kernels.ops.moe.fused_experts import fused_experts
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.weights import check_shape, make_parameter

# Checkpoint names of the three matrices of an expert, and of their stacked forms.
EXPERT_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
ExpertTensor = tuple[str, tuple[int, ...], Callable[[torch.Tensor], None]]


class FusedMoE(nn.Module):
    """``num_experts`` gated feed-forward experts, each split over the tensor-parallel ranks by its inner width.

    hidden: H. intermediate: I of one expert. top_k: experts a token. reduce_results: sum over ranks at the end.
    """

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, top_k: int, reduce_results: bool = True
    ) -> None:
        super().__init__()
        self._tp = get_tp_group()
        if intermediate % self._tp.size:
            raise ValueError(f"expert width {intermediate} cannot be split over {self._tp.size} tensor-parallel ranks.")
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.top_k = top_k
        self.reduce_results = reduce_results
        self.width = intermediate // self._tp.size
        self.w13_weight = make_parameter(num_experts, 2 * self.width, hidden)
        self.w2_weight = make_parameter(num_experts, hidden, self.width)

    def load_expert(self, name: str, expert_id: int, tensor: torch.Tensor) -> None:
        """Take matrix ``name`` of one expert: "w1" (gate) and "w3" (up) [I, H], "w2" (down) [H, I]."""
        start = self._tp.rank * self.width
        if name == "w2":
            check_shape(tensor, (self.hidden, self.intermediate))
            self.w2_weight.data[expert_id].copy_(tensor.narrow(1, start, self.width))
            return
        check_shape(tensor, (self.intermediate, self.hidden))
        offset = 0 if name == "w1" else self.width
        self.w13_weight.data[expert_id].narrow(0, offset, self.width).copy_(tensor.narrow(0, start, self.width))

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

    def forward(self, x: torch.Tensor, topk: TopKOutput) -> torch.Tensor:
        """x [N, H] (left as it is), topk with k = ``top_k`` -> new [N, H]: the weighted sum of the experts' outputs."""
        if topk.ids.shape[1] != self.top_k:
            raise ValueError(f"expected {self.top_k} experts a token, got {topk.ids.shape[1]}")
        out = fused_experts(x, self.w13_weight, self.w2_weight, topk.weights, topk.ids)
        return self._tp.all_reduce(out) if self.reduce_results else out
