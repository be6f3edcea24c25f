"""Which experts a token is routed to, and with what weight; only this file applies the routed scaling factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sglang.kernels.ops.moe.route_by_id import route_by_id
from sglang.kernels.ops.moe.topk import NO_SHARED, SCORINGS, SharedSlots, topk
from sglang.srt.layers.weights import IDS, Leaf, make_parameter


@dataclass(frozen=True)
class TopKOutput:
    """weights [N, k] float32, scaled, and expert ids [N, k] int32, unordered in a row; shared slots come last."""

    weights: torch.Tensor
    ids: torch.Tensor


class TopK(nn.Module):
    """Chooses ``top_k`` experts per token from router logits.

    scoring: one of ``SCORINGS``. renormalize: divide a row's weights by their sum. n_group, topk_group: experts come
    only from the best ``topk_group`` of ``n_group`` groups; a group counts as its best expert or, under a bias, as the
    sum of its best two. correction_bias [E] float32: added only for the selection.
    routed_scaling_factor: multiplied into the weights here only, so shared experts need no division by it.
    shared: the shared experts that a fused step adds.
    """

    def __init__(
        self,
        top_k: int,
        scoring: str,
        renormalize: bool,
        n_group: int = 1,
        topk_group: int = 1,
        correction_bias: torch.Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        shared: SharedSlots = NO_SHARED,
    ) -> None:
        super().__init__()
        if scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
        self.top_k = top_k
        self.scoring = scoring
        self.renormalize = renormalize
        self.n_group = n_group
        self.topk_group = topk_group
        self.correction_bias = correction_bias
        self.routed_scaling_factor = routed_scaling_factor
        self.shared = shared

    def forward(self, router_logits: torch.Tensor, fused: bool = False) -> TopKOutput:
        """router_logits [N, E], and in ``fused`` steps the shared slots' gate if they have one -> TopKOutput."""
        weights, ids = topk(
            router_logits, self.correction_bias, self.top_k, self.scoring, self.renormalize, self.n_group,
            self.topk_group, self.routed_scaling_factor, self.shared if fused else NO_SHARED,
        )  # fmt: skip
        return TopKOutput(weights, ids)


class HashTopK(nn.Module):
    """The experts that the checkpoint's table ``tid2eid`` [V, k] int32 lists for a token id, weighted by the router's
    scores.

    scoring and scaling as in ``TopK``; weights are divided by their sum.
    """

    def __init__(
        self, vocab_size: int, num_experts: int, top_k: int, scoring: str, routed_scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.scoring = scoring
        self.routed_scaling_factor = routed_scaling_factor
        table = Leaf("", IDS, ids_below=num_experts)
        self.tid2eid = make_parameter(vocab_size, top_k, dtype=torch.int32, leaves=(table,))

    def forward(self, router_logits: torch.Tensor, token_ids: torch.Tensor) -> TopKOutput:
        """router_logits [N, E], token_ids [N] int64 in the vocabulary, also in padded rows -> TopKOutput."""
        scale = self.routed_scaling_factor
        weights, ids = route_by_id(router_logits, token_ids, self.tid2eid, self.scoring, True, scale)
        return TopKOutput(weights, ids)
