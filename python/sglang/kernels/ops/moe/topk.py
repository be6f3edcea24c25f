"""Expert choice by score, with or without a bias, among all experts or inside the best groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, early_start, next_power_of_2, triton_impl
from sglang.kernels.spec import Impl, Op

# Experts that one program of the Triton router holds, groups and sizes rounded up to powers of two.
MAX_TRITON_EXPERTS = 1024
# What turns a router's logits into scores; "sqrtsoftplus" is DeepSeek V4's.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class Routing:
    """How a row's ``top_k`` experts follow from its scores, of ``SCORINGS``, and their weights from those.

    They come only from the best ``topk_group`` of ``n_group`` groups, whose experts stand side by side. A weight is the
    score, divided by the row's sum when ``renormalize``, times ``scale``.
    """

    top_k: int
    scoring: str
    renormalize: bool
    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")


class SharedSlots(NamedTuple):
    """Experts that every token is routed to, as columns after the selected ones: ids E .. E + ``num``, each at
    ``weight``.

    gated: the logits have a column more, whose sigmoid multiplies the weight. Neither scale nor renormalisation of the
    chosen ones touches it.
    """

    num: int = 0
    weight: float = 1.0
    gated: bool = False


NO_SHARED = SharedSlots()


def score_experts(logits: Tensor, scoring: str) -> Tensor:
    """Scores float32 of logits [N, E] by a name of ``SCORINGS``."""
    if scoring == "softmax":
        return logits.float().softmax(-1)
    if scoring == "sigmoid":
        return logits.float().sigmoid()
    return torch.nn.functional.softplus(logits.float()).sqrt()


def _keep_groups(choice: Tensor, n_group: int, topk_group: int, by_best_two: bool) -> Tensor:
    """Set all experts outside the best groups to -inf; a group is worth its best expert, or its best two together."""
    grouped = choice.unflatten(1, (n_group, -1))
    worth = grouped.topk(2, dim=-1, sorted=False).values.sum(-1) if by_best_two else grouped.amax(-1)
    kept = worth.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def topk_torch(
    logits: Tensor, bias: Tensor | None, rule: Routing, shared: SharedSlots = NO_SHARED
) -> tuple[Tensor, Tensor]:
    """The k best experts by score, or by score + bias, inside the best ``topk_group`` groups; then the shared experts.

    logits [N, E] float with E = n_group * group size, topk_group * group size >= k. bias [E] float32 steers the choice
    and never enters a weight. A group counts as its best expert (DeepSeek-V2 report, section 2.2.2) or, under a bias,
    as the sum of its best two, of which it then has as many (DeepSeek-V3 report, eqs. 13-16) -> weights [N, k] float32,
    ids [N, k] int32 in [0, E), distinct in a row, in no particular order; ties may take any. A row with NaN still gets
    valid ids. ``shared`` adds columns at the end.
    """
    experts = logits.shape[1] - shared.gated
    scores = score_experts(logits[:, :experts], rule.scoring)
    choice = scores if bias is None else scores + bias
    if rule.topk_group < rule.n_group:
        choice = _keep_groups(choice, rule.n_group, rule.topk_group, by_best_two=bias is not None)
    ids = choice.topk(rule.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if rule.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights, ids = weights * rule.scale, ids.to(torch.int32)
    if shared.num:
        gate = logits[:, experts:].float().sigmoid() if shared.gated else weights.new_ones(len(ids), 1)
        slots = torch.arange(experts, experts + shared.num, dtype=torch.int32, device=ids.device)
        ids = torch.cat((ids, slots.expand(len(ids), -1)), dim=1)
        weights = torch.cat((weights, (gate * shared.weight).expand(-1, shared.num)), dim=1)
    return weights, ids


def topk_triton(
    logits: Tensor, bias: Tensor | None, rule: Routing, shared: SharedSlots = NO_SHARED
) -> tuple[Tensor, Tensor]:
    from sglang.kernels.ops.moe.topk_triton import router_kernel

    rows, experts, columns = logits.shape[0], logits.shape[1] - shared.gated, rule.top_k + shared.num
    weights = torch.empty(rows, columns, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, columns, dtype=torch.int32, device=logits.device)
    if rows:
        size = experts // rule.n_group
        router_kernel[(rows,)](
            logits, bias, weights, ids, logits.stride(0), size, rule.scale, shared.weight,
            TOP_K=rule.top_k, SHARED=shared.num, GATED=shared.gated, K_BLOCK=next_power_of_2(columns),
            N_GROUP=rule.n_group, TOPK_GROUP=rule.topk_group, GROUPS=next_power_of_2(rule.n_group),
            SIZE=next_power_of_2(size), SCORING=rule.scoring, RENORMALIZE=rule.renormalize, HAS_BIAS=bias is not None,
            num_warps=1 if experts <= 512 else 4, **early_start(),
        )  # fmt: skip
    return weights, ids


def _accepts(logits: Tensor, bias: Tensor | None, rule: Routing, shared: SharedSlots = NO_SHARED) -> bool:
    experts = logits.shape[1] - shared.gated
    groups, size = rule.n_group, experts // rule.n_group
    readable = logits.dtype in FLOATS and logits.stride(1) == 1
    biased = bias is None or (bias.is_contiguous() and bias.dtype in FLOATS and size >= 2)
    held = experts == size * groups and next_power_of_2(groups) * next_power_of_2(size) <= MAX_TRITON_EXPERTS
    return readable and biased and held and 0 < rule.top_k <= min(rule.topk_group, groups) * size


topk = Op("moe.topk", triton_impl(topk_triton, _accepts), Impl("torch", topk_torch))
