"""Experts that a table gives to each token id, weighted by the router's scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.moe.topk import Routing, score_experts
from sglang.kernels.spec import Case, Impl, Op


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


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(11, 16, generator=generator).argsort(-1)[:, :4].to(torch.int32)
    for rows in (1, 7, 0, 40):
        logits = torch.randn(rows, 16, generator=generator) * 3
        token_ids = torch.randint(0, 11, (rows,), generator=generator)
        for rule in (Routing(4, "sqrtsoftplus", True, scale=1.5), Routing(4, "sigmoid", False)):
            yield Case(f"{rows}-rows-{rule.scoring}", (logits, token_ids, table, rule))
    far = torch.tensor([[-60.0, 0.0, 80.0, -3.0]]).repeat(2, 4)
    yield Case("far", (far, torch.tensor([10, 0]), table, Routing(4, "sqrtsoftplus", True, scale=1.5)))


route_by_id = Op("moe.route_by_id", Impl("torch", route_by_id_torch), cases=_cases)
