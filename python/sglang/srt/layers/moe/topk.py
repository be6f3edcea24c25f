"""Which experts a token is routed to, and with what weight; only this file applies the routed scaling factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sglang.kernels.ops.moe.route_by_id import route_by_id
from sglang.kernels.ops.moe.topk import NO_SHARED, Routing, SharedSlots, topk
from sglang.srt.layers.weights import IDS, Leaf, make_parameter


@dataclass(frozen=True)
class TopKOutput:
    """weights [N, k] float32, scaled, and expert ids [N, k] int32, unordered in a row; shared slots come last."""

    weights: torch.Tensor
    ids: torch.Tensor


class TopK(nn.Module):
    """Chooses experts per token from router logits, by ``rule``.

    correction_bias [E] float32: added only for the selection. The rule's scale is multiplied into the weights here
    only, so shared experts need no division by it. shared: the shared experts that a fused step adds.
    """

    def __init__(
        self, rule: Routing, correction_bias: torch.Tensor | None = None, shared: SharedSlots = NO_SHARED
    ) -> None:
        super().__init__()
        self.rule, self.correction_bias, self.shared = rule, correction_bias, shared

    def forward(self, router_logits: torch.Tensor, fused: bool = False) -> TopKOutput:
        """router_logits [N, E], and in ``fused`` steps the shared slots' gate if they have one -> TopKOutput."""
        return TopKOutput(*topk(router_logits, self.correction_bias, self.rule, self.shared if fused else NO_SHARED))


class HashTopK(nn.Module):
    """The experts that the checkpoint's table ``tid2eid`` [V, k] int32 lists for a token id, weighted by the router's
    scores; ``rule`` gives these and the weights, and its groups do not matter.
    """

    def __init__(self, vocab_size: int, num_experts: int, rule: Routing) -> None:
        super().__init__()
        self.rule = rule
        table = Leaf("", IDS, ids_below=num_experts)
        self.tid2eid = make_parameter(vocab_size, rule.top_k, dtype=torch.int32, leaves=(table,))

    def forward(self, router_logits: torch.Tensor, token_ids: torch.Tensor) -> TopKOutput:
        """router_logits [N, E], token_ids [N] int64 in the vocabulary, also in padded rows -> TopKOutput."""
        return TopKOutput(*route_by_id(router_logits, token_ids, self.tid2eid, self.rule))
