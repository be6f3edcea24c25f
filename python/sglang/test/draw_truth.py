"""The sampled token of one row in float64, step by step, and how near the sample is to a boundary between ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from sglang.kernels.ops.sampling.draw import COUNT, SEEN, STOP
from sglang.kernels.ops.sampling.seeded import uniform_from_seed_torch
from sglang.srt.sampling.logit_edits import EditColumns, LogitEdits, SamplingRow
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

CPU = torch.device("cpu")
# Distance, as a share of the row's mass, from a boundary up to which another id is right too.
NEAR = 1e-6


def device_edits(rows: Sequence[SamplingRow], vocab_size: int) -> LogitEdits:
    """The tensors that a device would have for ``rows``, on the host."""
    edits = EditColumns(rows, vocab_size)
    return edits.build({name: torch.from_numpy(column) for name, column in edits.columns().items()})


def both_forms(rows: Sequence[SamplingRow], vocab_size: int) -> Iterator[tuple[str, SamplingBatchInfo]]:
    """A batch with the edits of a host, then with those of a device."""
    for form in ("host", "device"):
        info = SamplingBatchInfo.from_rows(rows, vocab_size, CPU)
        with_edits = form == "device" and info.edits is not None
        yield form, replace(info, edits=device_edits(rows, vocab_size)) if with_edits else info


def true_scores(args: tuple[Any, ...], row: int) -> torch.Tensor:
    """Edited, masked and scaled logits of a row: [V] float32."""
    logits, temperatures = args[:2]
    allowed, edit_rows, marks, penalties, left, bias = args[9:15]
    x = logits[row].float().clone()
    edit = -1 if edit_rows is None else int(edit_rows[row])
    if edit >= 0:
        mark, (frequency, presence, repetition) = marks[edit], penalties[edit].unbind()
        seen, count = (mark & SEEN) != 0, mark & COUNT
        x[seen] = torch.where(x > 0, x / repetition, x * repetition)[seen]
        x[count > 0] -= (frequency * count + presence)[count > 0]
        if bias is not None:
            x += bias[edit]
        if left[edit] > 0:
            x[(mark & STOP) != 0] = -math.inf
    if allowed is not None:
        ids = torch.arange(len(x), device=x.device)
        x[(allowed[row, ids >> 5] >> (ids & 31)) & 1 == 0] = -math.inf
    return x / temperatures[row]


def true_draw(args: tuple[Any, ...], row: int) -> tuple[int, float]:
    """The id of a sound row, and the distance of its draw and of its filters' cuts from the nearest boundary."""
    top_ks, top_ps, min_ps, greedy, seeds, positions = args[2:8]
    scores = true_scores(args, row)
    if bool(greedy[row]):
        return int((scores == scores.max()).nonzero()[0]), 1.0
    probs = torch.softmax(scores.double(), -1)
    order = torch.sort(scores, descending=True, stable=True).indices
    k, p, m = int(top_ks[row]), float(top_ps[row]), float(min_ps[row])
    listed, distance = probs[order], 1.0
    if 0 < k < len(order):
        order, listed = order[:k], listed[:k]
    if p < 1.0:
        before = (listed.cumsum(0) - listed) / listed.sum()
        kept = before < p
        kept[0] = True
        distance = min(distance, _nearest(before[1:], p))
        order = order[kept]
    share = probs / probs.max()
    if m > 0.0:
        distance = min(distance, _nearest(share[share < 1.0], m))
        order = order[share[order] >= m]
    left = torch.zeros_like(probs)
    left[order] = probs[order]
    ends = left.cumsum(0) / left.sum()
    target = uniform_from_seed_torch(seeds[row : row + 1], positions[row : row + 1]).item()
    drawn = int((ends > target).nonzero()[0])
    start = float(ends[drawn] - left[drawn] / left.sum())
    return drawn, min(distance, float(ends[drawn]) - target, target - start if start > 0 else 1.0)


def _nearest(values: torch.Tensor, to: float) -> float:
    return float((values - to).abs().min()) if values.numel() else 1.0


def judge_draw(args: tuple[Any, ...], ids: torch.Tensor, faults: torch.Tensor, wanted: torch.Tensor) -> int:
    """AssertionError unless faults are ``wanted`` and ids true or near a boundary; how many the latter are."""
    assert torch.equal(faults, wanted), (faults.tolist(), wanted.tolist())
    assert bool(((ids >= 0) & (ids < args[0].shape[1])).all()), ids.tolist()
    near = 0
    for row in (wanted == 0).nonzero().flatten().tolist():
        drawn, distance = true_draw(args, row)
        if int(ids[row]) != drawn:
            assert distance < NEAR, f"row {row}: {int(ids[row])}, not {drawn}; {distance:.2g} from a boundary"
            near += 1
    return near
