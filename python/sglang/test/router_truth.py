"""Checks results of a router: any order and any choice among equal scores is right, so they are not compared."""

from __future__ import annotations

import math
from typing import Any

import torch

from sglang.kernels.ops.moe.topk import SharedSlots


def scores_of(row: list[float], scoring: str) -> list[float]:
    """The scores of a row of logits."""
    if scoring == "sigmoid":
        return [0.0 if value <= -700 else 1 / (1 + math.exp(-value)) for value in row]
    if scoring == "sqrtsoftplus":
        return [
            math.sqrt(value + math.log1p(math.exp(-value)) if value > 0 else math.log1p(math.exp(value)))
            for value in row
        ]
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    return [value / sum(exps) for value in exps]


def check_shared(args: Any, out: Any) -> tuple[Any, Any]:
    """AssertionError unless the last columns are the shared slots; the arguments and columns of the router alone."""
    logits, *rest, (count, weight, gated) = args
    experts = logits.shape[1] - gated
    for row, slot_weights, ids in zip(logits.double().tolist(), *(part[:, -count:].tolist() for part in out)):
        assert ids == list(range(experts, experts + count)), ids
        wanted = weight * scores_of(row[experts:], "sigmoid")[0] if gated else weight
        assert all(abs(found - wanted) < 1e-6 or found != found and wanted != wanted for found in slot_weights)
    return (logits[:, :experts], *rest), [part[:, :-count] for part in out]


def check_router(args: Any, out: Any) -> None:
    """AssertionError unless ``out`` is a correct result of ``moe.topk``."""
    if isinstance(args[-1], SharedSlots):
        args, out = check_shared(args, out)
    (logits, bias, rule), (weights, ids) = args, out
    top_k, scoring, n_group, topk_group = rule.top_k, rule.scoring, rule.n_group, rule.topk_group
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.shape == ids.shape == (logits.shape[0], top_k)
    size = logits.shape[1] // n_group
    for row, row_weights, row_ids in zip(logits.double().tolist(), weights.tolist(), ids.tolist()):
        assert len(set(row_ids)) == top_k and all(0 <= i < logits.shape[1] for i in row_ids), row_ids
        if any(math.isnan(value) for value in row) or (scoring == "softmax" and max(row) == -math.inf):
            continue
        scores = scores_of(row, scoring)
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist())]
        groups = [choice[g * size : (g + 1) * size] for g in range(n_group)]
        worth = [max(group) if bias is None else sum(sorted(group)[-2:]) for group in groups]
        kept = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
        allowed = [i for i in range(len(choice)) if i // size in kept]
        best = sorted((choice[i] for i in allowed), reverse=True)[:top_k]
        found = sorted((choice[i] for i in row_ids), reverse=True)
        assert all(abs(a - b) < 1e-6 for a, b in zip(best, found)), (best, found)
        assert len({i // size for i in row_ids}) <= topk_group
        total = sum(scores[i] for i in row_ids) + 1e-20 if rule.renormalize else 1.0
        for weight, i in zip(row_weights, row_ids):
            wanted = scores[i] / total * rule.scale
            assert abs(weight - wanted) < 1e-5, (weight, wanted)
