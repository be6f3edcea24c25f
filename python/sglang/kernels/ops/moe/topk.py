"""Expert choice of the three router families: softmax, softmax limited to groups, biased sigmoid limited to groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sglang.kernels.launch import FLOATS, next_power_of_2, triton_impl
from sglang.kernels.spec import Case, Impl, Op

# Experts that one program of the Triton router holds, groups and sizes rounded up to powers of two.
MAX_TRITON_EXPERTS = 1024


class SharedSlots(NamedTuple):
    """Experts that every token goes to, as columns after the chosen ones: ids E .. E + ``num``, each at ``weight``.

    gated: the logits have a column more, whose sigmoid multiplies the weight. Neither scale nor renormalisation of the
    chosen ones touches it.
    """

    num: int = 0
    weight: float = 1.0
    gated: bool = False


NO_SHARED = SharedSlots()


def _split(logits: torch.Tensor, shared: SharedSlots) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts' columns, and what every shared slot of a row weighs [N, 1] float32."""
    experts = logits.shape[1] - shared.gated
    gate = logits[:, experts:].float().sigmoid() if shared.gated else logits.new_ones(len(logits), 1).float()
    return logits[:, :experts], gate * shared.weight


def _finish(
    weights: torch.Tensor, ids: torch.Tensor, renormalize: bool, scale: float, first: int, slot_weight: torch.Tensor,
    shared: SharedSlots,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if scale != 1.0:
        weights = weights * scale
    ids = ids.to(torch.int32)
    if shared.num:
        slots = torch.arange(first, first + shared.num, dtype=torch.int32, device=ids.device)
        ids = torch.cat((ids, slots.expand(len(ids), -1)), dim=1)
        weights = torch.cat((weights, slot_weight.expand(-1, shared.num)), dim=1)
    return weights, ids


def _keep_groups(choice: torch.Tensor, group_scores: torch.Tensor, topk_group: int) -> torch.Tensor:
    """Set the scores of all experts outside the best ``topk_group`` groups to -inf."""
    kept = group_scores.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    grouped = choice.unflatten(1, (group_scores.shape[1], -1))
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


def _score(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "softmax":
        return logits.float().softmax(-1)
    if scoring == "sigmoid":
        return logits.float().sigmoid()
    raise ValueError(f"scoring must be softmax or sigmoid, got {scoring!r}")


def topk_plain_torch(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, scale: float, shared: SharedSlots = NO_SHARED
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best experts by score, and the shared slots.

    logits [N, E] float, scoring "softmax" or "sigmoid" -> weights [N, k] float32, ids [N, k] int32 in [0, E), distinct
    in a row, in no particular order; ties may take any. A weight is the score, divided by the row's sum when
    ``renormalize``, times ``scale``. A row with NaN still gets valid ids. ``shared`` adds columns at the end.
    """
    logits, slot_weight = _split(logits, shared)
    weights, ids = _score(logits, scoring).topk(top_k, dim=-1, sorted=False)
    return _finish(weights, ids, renormalize, scale, logits.shape[1], slot_weight, shared)


def topk_grouped_torch(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int, scale: float,
    shared: SharedSlots = NO_SHARED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best experts inside the ``topk_group`` groups with the largest single score.

    logits [N, E] with E = n_group * group size, experts of a group side by side; topk_group * group size >= k.
    Returns as ``topk_plain_torch``. DeepSeek-V2 report, section 2.2.2 (device-limited routing).
    """
    logits, slot_weight = _split(logits, shared)
    scores = _score(logits, scoring)
    group_scores = scores.unflatten(1, (n_group, -1)).amax(-1)
    ids = _keep_groups(scores, group_scores, topk_group).topk(top_k, dim=-1, sorted=False).indices
    return _finish(scores.gather(1, ids), ids, renormalize, scale, logits.shape[1], slot_weight, shared)


def topk_biased_grouped_torch(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
    shared: SharedSlots = NO_SHARED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best experts by score + bias inside the ``topk_group`` groups with the largest sum of their best two.

    logits [N, E] with E = n_group * group size and group size >= 2, bias [E] float32 (steers the choice and never
    enters a weight). Returns as ``topk_plain_torch``. DeepSeek-V3 report, eqs. 13-16.
    """
    logits, slot_weight = _split(logits, shared)
    scores = _score(logits, scoring)
    choice = scores + bias
    group_scores = choice.unflatten(1, (n_group, -1)).topk(2, dim=-1, sorted=False).values.sum(-1)
    ids = _keep_groups(choice, group_scores, topk_group).topk(top_k, dim=-1, sorted=False).indices
    return _finish(scores.gather(1, ids), ids, renormalize, scale, logits.shape[1], slot_weight, shared)


def _launch_router(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
    shared: SharedSlots = NO_SHARED,
) -> tuple[torch.Tensor, torch.Tensor]:
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
            SIGMOID=scoring == "sigmoid", RENORMALIZE=renormalize, HAS_BIAS=bias is not None,
            num_warps=1 if experts <= 512 else 4,
        )  # fmt: skip
    return weights, ids


def topk_plain_triton(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, scale: float, shared: SharedSlots = NO_SHARED
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_router(logits, None, top_k, scoring, renormalize, 1, 1, scale, shared)


def topk_grouped_triton(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int, scale: float,
    shared: SharedSlots = NO_SHARED,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _launch_router(logits, None, top_k, scoring, renormalize, n_group, topk_group, scale, shared)


def _fits_router(
    logits: torch.Tensor, top_k: int, scoring: str, n_group: int, topk_group: int, shared: SharedSlots
) -> bool:
    experts = logits.shape[1] - shared.gated
    size = experts // n_group
    readable = logits.dtype in FLOATS and logits.stride(1) == 1 and scoring in ("softmax", "sigmoid")
    held = experts == size * n_group and next_power_of_2(n_group) * next_power_of_2(size) <= MAX_TRITON_EXPERTS
    return readable and held and 0 < top_k <= min(topk_group, n_group) * size


def _accepts_plain(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, scale: float, shared: SharedSlots = NO_SHARED
) -> bool:
    return _fits_router(logits, top_k, scoring, 1, 1, shared)


def _accepts_grouped(
    logits: torch.Tensor, top_k: int, scoring: str, renormalize: bool, n_group: int, topk_group: int, scale: float,
    shared: SharedSlots = NO_SHARED,
) -> bool:  # fmt: skip
    return _fits_router(logits, top_k, scoring, n_group, topk_group, shared)


def _accepts_biased(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
    shared: SharedSlots = NO_SHARED,
) -> bool:
    readable = bias.is_contiguous() and bias.dtype in FLOATS and logits.shape[1] >= 2 * n_group
    return readable and _fits_router(logits, top_k, scoring, n_group, topk_group, shared)


def _logits() -> Iterator[tuple[str, torch.Tensor]]:
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
        for scoring, renormalize, scale in (("softmax", False, 1.0), ("softmax", True, 1.0), ("sigmoid", True, 2.5)):
            yield Case(f"{name}-{scoring}-{renormalize}", (logits, 4, scoring, renormalize, scale))
        for shared in (SharedSlots(1, gated=True), SharedSlots(2, 0.5), SharedSlots(3, 0.25, gated=True)):
            # A gate beside 16 experts, in rows that are longer than they need to be.
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


def serving_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Routers of served models for 128 tokens, without contents."""
    v2lite, v2, v3 = (torch.empty(128, experts, device=device) for experts in (64, 160, 256))
    yield topk_plain, Case("v2lite t128", (v2lite, 6, "softmax", False, 1.0))
    yield topk_plain, Case("qwen35 t128", (v3.to(torch.bfloat16), 8, "softmax", True, 1.0))
    yield topk_grouped, Case("v2 t128", (v2, 6, "softmax", False, 8, 3, 16.0))
    bias = torch.empty(256, device=device)
    yield topk_biased_grouped, Case("v3 t128", (v3, bias, 8, "sigmoid", True, 8, 4, 2.5))
    gated = torch.empty(128, 264, dtype=torch.bfloat16, device=device)[:, :257]
    yield topk_plain, Case("qwen35 t128 shared", (gated, 8, "softmax", True, 1.0, SharedSlots(1, gated=True)))
    yield topk_plain, Case("v2lite t128 shared", (v2lite, 6, "softmax", False, 1.0, SharedSlots(2)))
    yield topk_biased_grouped, Case("v3 t128 shared", (v3, bias, 8, "sigmoid", True, 8, 4, 2.5, SharedSlots(1)))


topk_plain = Op(
    "moe.topk_plain",
    triton_impl(topk_plain_triton, _accepts_plain),
    Impl("torch", topk_plain_torch),
    cases=_plain_cases,
)
topk_grouped = Op(
    "moe.topk_grouped",
    triton_impl(topk_grouped_triton, _accepts_grouped),
    Impl("torch", topk_grouped_torch),
    cases=_grouped_cases,
)
topk_biased_grouped = Op(
    "moe.topk_biased_grouped",
    triton_impl(_launch_router, _accepts_biased),
    Impl("torch", topk_biased_grouped_torch),
    cases=_biased_cases,
)
