"""Experts that a table gives to each token id, weighted by the router's scores."""

from __future__ import annotations

from torch import Tensor

from sglang.kernels.ops.moe.topk import Routing, score_experts
from sglang.kernels.spec import Impl, Op


def route_by_id_torch(logits: Tensor, token_ids: Tensor, table: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """The experts ``table[token_ids]``, each at its score.

    logits [N, E] float, token_ids [N] int64 in [0, V), table [V, k] int32 in [0, E) -> weights [N, k] float32, ids
    [N, k] int32 in the table's order. Weights follow from scores by ``rule`` (see ``moe.topk``), whose groups do not
    matter. DeepSeek-V4 report (hash-routed layers).
    """
    ids = table.index_select(0, token_ids)
    weights = score_experts(logits, rule.scoring).gather(1, ids.long())
    if rule.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scale, ids


route_by_id = Op("moe.route_by_id", Impl("torch", route_by_id_torch))
