"""Expert choice by score: softmax, softmax limited to groups, and biased scores, limited to groups or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, next_power_of_2, triton_impl
from sglang.kernels.spec import Case, Impl, Op

# Experts that one program of the Triton router holds, groups and sizes rounded up to powers of two.
MAX_TRITON_EXPERTS = 1024


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


# What turns a router's logits into scores; "sqrtsoftplus" is DeepSeek V4's.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


def score_experts(logits: Tensor, scoring: str) -> Tensor:
    """Scores float32 of logits [N, E] by a name of ``SCORINGS``; raises ValueError for another."""
    if scoring == "softmax":
        return logits.float().softmax(-1)
    if scoring == "sigmoid":
        return logits.float().sigmoid()
    if scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits.float()).sqrt()
    raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")


def _keep_groups(choice: Tensor, n_group: int, topk_group: int, by_best_two: bool) -> Tensor:
    """Set all experts outside the best groups to -inf; a group is worth its best expert, or its best two together."""
    grouped = choice.unflatten(1, (n_group, -1))
    worth = grouped.topk(2, dim=-1, sorted=False).values.sum(-1) if by_best_two else grouped.amax(-1)
    kept = worth.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def _route(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int,
    scale: float, shared: SharedSlots,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    experts = logits.shape[1] - shared.gated
    scores = score_experts(logits[:, :experts], scoring)
    choice = scores if bias is None else scores + bias
    if topk_group < n_group:
        choice = _keep_groups(choice, n_group, topk_group, by_best_two=bias is not None)
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights, ids = weights * scale, ids.to(torch.int32)
    if shared.num:
        gate = logits[:, experts:].float().sigmoid() if shared.gated else weights.new_ones(len(ids), 1)
        slots = torch.arange(experts, experts + shared.num, dtype=torch.int32, device=ids.device)
        ids = torch.cat((ids, slots.expand(len(ids), -1)), dim=1)
        weights = torch.cat((weights, (gate * shared.weight).expand(-1, shared.num)), dim=1)
    return weights, ids


def topk_plain_torch(
    logits: Tensor, top_k: int, scoring: str, renormalize: bool, scale: float, shared: SharedSlots = NO_SHARED
) -> tuple[Tensor, Tensor]:
    """The k best experts by score, and the shared experts.

    logits [N, E] float, scoring of ``SCORINGS`` -> weights [N, k] float32, ids [N, k] int32 in [0, E), distinct
    in a row, in no particular order; ties may take any. A weight is the score, divided by the row's sum when
    ``renormalize``, times ``scale``. A row with NaN still gets valid ids. ``shared`` adds columns at the end.
    """
    return _route(logits, None, top_k, scoring, renormalize, 1, 1, scale, shared)


def topk_grouped_torch(
    logits: Tensor, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int, scale: float,
    shared: SharedSlots = NO_SHARED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best experts inside the ``topk_group`` groups with the largest single score.

    logits [N, E] with E = n_group * group size, experts of a group side by side; topk_group * group size >= k.
    Returns as ``topk_plain_torch``. DeepSeek-V2 report, section 2.2.2 (device-limited routing).
    """
    return _route(logits, None, top_k, scoring, renormalize, n_group, topk_group, scale, shared)


def topk_biased_grouped_torch(
    logits: Tensor, bias: Tensor, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int,
    scale: float, shared: SharedSlots = NO_SHARED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best experts by score + bias inside the ``topk_group`` groups with the largest sum of their best two.

    logits [N, E] with E = n_group * group size and group size >= 2, bias [E] float32 (steers the choice and never
    enters a weight). Returns as ``topk_plain_torch``. DeepSeek-V3 report, eqs. 13-16.
    """
    return _route(logits, bias, top_k, scoring, renormalize, n_group, topk_group, scale, shared)


def _launch_router(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int,
    scale: float, shared: SharedSlots = NO_SHARED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sglang.kernels.ops.moe.topk_triton import router_kernel

    rows, experts, columns = logits.shape[0], logits.shape[1] - shared.gated, top_k + shared.num
    weights = torch.empty(rows, columns, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, columns, dtype=torch.int32, device=logits.device)
    if rows:
        size = experts // n_group
        router_kernel[(rows,)](
            logits, bias, weights, ids, logits.stride(0), size, scale, shared.weight,
            TOP_K=top_k, SHARED=shared.num, GATED=shared.gated, K_BLOCK=next_power_of_2(columns), N_GROUP=n_group,
            TOPK_GROUP=topk_group, GROUPS=next_power_of_2(n_group), SIZE=next_power_of_2(size),
            SCORING=scoring, RENORMALIZE=renormalize, HAS_BIAS=bias is not None,
            num_warps=1 if experts <= 512 else 4,
        )  # fmt: skip
    return weights, ids


def _fits_router(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int,
    scale: float, shared: SharedSlots = NO_SHARED,
) -> bool:  # fmt: skip
    experts = logits.shape[1] - shared.gated
    size = experts // n_group
    readable = logits.dtype in FLOATS and logits.stride(1) == 1 and scoring in SCORINGS
    biased = bias is None or (bias.is_contiguous() and bias.dtype in FLOATS and size >= 2)
    held = experts == size * n_group and next_power_of_2(n_group) * next_power_of_2(size) <= MAX_TRITON_EXPERTS
    return readable and biased and held and 0 < top_k <= min(topk_group, n_group) * size


def _grouped(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which takes a bias after the logits, by the arguments of ``topk_grouped``."""
    return lambda logits, *others: run(logits, None, *others)


def _plain(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same by the arguments of ``topk_plain``."""
    return lambda logits, top_k, scoring, renormalize, scale, shared=NO_SHARED: run(
        logits, None, top_k, scoring, renormalize, 1, 1, scale, shared
    )


def _logits() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 0, 64):
        yield f"{rows}-rows", torch.randn(rows, 16, generator=generator) * 2
    yield "ties", torch.zeros(3, 16)
    ugly = torch.randn(4, 16, generator=generator)
    ugly[0, 3] = float("nan")
    ugly[1, :8] = float("-inf")
    ugly[2, 5] = 300.0
    ugly[3] = float("-inf")
    yield "nan-inf", ugly


def _plain_cases() -> Iterator[Case]:
    for name, logits in _logits():
        kinds = (("softmax", False, 1.0), ("softmax", True, 1.0), ("sigmoid", True, 2.5), ("sqrtsoftplus", True, 1.5))
        for scoring, renormalize, scale in kinds:
            yield Case(f"{name}-{scoring}-{renormalize}", (logits, 4, scoring, renormalize, scale))
        for shared in (SharedSlots(1, gated=True), SharedSlots(2, 0.5), SharedSlots(3, 0.25, gated=True)):
            # A gate next to 16 experts, in rows that are longer than necessary.
            padded = torch.nn.functional.pad(logits, (0, 7), value=-0.5)[:, : 16 + shared.gated]
            yield Case(f"{name}-{shared}", (padded, 4, "softmax", True, 2.5, shared))


def _grouped_cases() -> Iterator[Case]:
    for name, logits in _logits():
        for n_group, topk_group in ((4, 2), (8, 3), (1, 1)):
            yield Case(f"{name}-{n_group}-{topk_group}", (logits, 4, "softmax", False, n_group, topk_group, 16.0))
        yield Case(f"{name}-shared", (logits, 4, "softmax", False, 4, 2, 16.0, SharedSlots(2)))


def _biased_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(3)
    for name, logits in _logits():
        bias = torch.randn(16, generator=generator)
        for n_group, topk_group in ((4, 2), (8, 3), (1, 1)):
            yield Case(f"{name}-{n_group}-{topk_group}", (logits, bias, 4, "sigmoid", True, n_group, topk_group, 2.5))
        yield Case(f"{name}-shared", (logits, bias, 4, "sigmoid", True, 4, 2, 2.5, SharedSlots(1, 0.25)))
        yield Case(f"{name}-sqrtsoftplus", (logits, bias, 4, "sqrtsoftplus", True, 1, 1, 1.5))


topk_plain = Op(
    "moe.topk_plain",
    triton_impl(_plain(_launch_router), _plain(_fits_router)),
    Impl("torch", topk_plain_torch),
    cases=_plain_cases,
)
topk_grouped = Op(
    "moe.topk_grouped",
    triton_impl(_grouped(_launch_router), _grouped(_fits_router)),
    Impl("torch", topk_grouped_torch),
    cases=_grouped_cases,
)
topk_biased_grouped = Op(
    "moe.topk_biased_grouped",
    triton_impl(_launch_router, _fits_router),
    Impl("torch", topk_biased_grouped_torch),
    cases=_biased_cases,
)
