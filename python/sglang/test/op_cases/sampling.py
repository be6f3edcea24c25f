"""Cases of the ops ``sampling.*``: each function has the name of its op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.kernels.ops.sampling.draw import SEEN, STOP, Wanted
from sglang.test.op_cases import Case


def check_ids() -> Iterator[Case]:
    for dtype, largest in ((torch.int32, 2**31 - 1), (torch.int64, 2**63 - 1)):
        chosen = torch.tensor([0, 31, 32, -1, largest, -largest - 1, 7, 77], dtype=dtype)
        faults = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
        yield Case(f"outside-{dtype}".replace("torch.", ""), (chosen, faults, 32))
        yield Case(f"many-{dtype}".replace("torch.", ""), (chosen.repeat(65), faults.repeat(65), 77))
    yield Case("none", (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 32))
    yield Case("one", (torch.tensor([5]), torch.tensor([0]), 5))


def marks_of(rows: list[list[tuple[int, int]]], vocab: int) -> Tensor:
    """Marks [P, V] int32 of (id, mark) pairs, for cases and tests."""
    marks = torch.zeros(len(rows), vocab, dtype=torch.int32)
    for row, pairs in zip(marks, rows, strict=True):
        for token_id, mark in pairs:
            row[token_id] = mark
    return marks


class RowOf(NamedTuple):
    """Rows of a case: one value for all, or one per row."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False


def draw_args(logits: Tensor, rows: list[RowOf] | RowOf, seed: int = 0, **edits: Tensor) -> tuple[object, ...]:
    """Arguments of the op on the device of ``logits`` for the rows' parameters, for cases, tests and benches."""
    rows = [rows] * logits.shape[0] if isinstance(rows, RowOf) else rows
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.bool)
    names = ("temperature", "top_k", "top_p", "min_p", "greedy")
    columns = [
        torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=logits.device)
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    index = torch.arange(len(rows), device=logits.device)
    wanted = Wanted(
        any(not row.greedy for row in rows), any(row.greedy for row in rows), any(row.top_k > 0 for row in rows),
        any(row.top_p < 1.0 for row in rows), any(row.min_p > 0.0 for row in rows),
    )  # fmt: skip
    others = ("allowed", "edit_rows", "marks", "penalties", "left", "bias")
    return (logits, *columns, index * 7919 + seed, index + 17, wanted, *(edits.get(name) for name in others))


def draw() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    plain, both = RowOf(), RowOf(0.8, 40, 0.9, 0.01)
    rows = [plain, both, RowOf(greedy=True), RowOf(1.0, 1), RowOf(1.3, top_p=0.5), RowOf(2.0, min_p=0.2),
            RowOf(0.7, 3, 0.35), RowOf(top_p=1e-6), RowOf(top_p=0.0), RowOf(1.0, 10**6, 1.0, 1.0)]  # fmt: skip
    for vocab, few in ((1, rows[:2]), (7, rows[3:6]), (151, rows), (4097, rows[1:3]), (20_001, rows)):
        logits = torch.randn(len(few), vocab, generator=generator) * 3
        yield Case(f"{vocab}-mixed", draw_args(logits, few))
        yield Case(f"{vocab}-one-row", draw_args(logits[:1], plain, 3))
    yield Case("20001-bfloat16", draw_args(logits.to(torch.bfloat16), rows))  # of which many are equal
    # More scores are close to each other than a chunk holds: the row itself is searched.
    logits[0, :2500] += 20.0
    yield Case("20001-crowded", draw_args(logits[:2], [RowOf(top_k=2300), RowOf(top_p=0.5)]))
    yield Case("empty", draw_args(torch.empty(0, 9), both))
    yield Case("all-greedy", draw_args(torch.randn(3, 65, generator=generator), RowOf(greedy=True)))
    ties = torch.zeros(4, 300)
    ties[1, ::3] = 2.0
    ties[2, 7] = ties[2, 299] = 9.0
    ties[3, 100:] = -math.inf
    yield Case("ties-top-k", draw_args(ties, RowOf(top_k=5)))
    yield Case("ties-top-p", draw_args(ties, RowOf(top_p=0.302)))
    yield Case("ties-min-p", draw_args(ties, RowOf(min_p=1.0)))
    yield Case("ties-both", draw_args(ties, RowOf(top_k=50, top_p=0.71)))
    ugly = torch.randn(5, 65, generator=generator)
    ugly[0], ugly[2], ugly[3, 5:] = -math.inf, math.nan, -math.inf
    ugly[1, 3], ugly[4, 1] = math.nan, math.inf
    for name, row in (("plain", plain), ("filtered", both), ("greedy", RowOf(greedy=True))):
        yield Case(f"inf-nan-{name}", draw_args(ugly, row))
    yield from _edited_cases(rows, generator)


def _edited_cases(rows: list[RowOf], generator: torch.Generator) -> Iterator[Case]:
    logits = torch.randn(len(rows), 151, generator=generator) * 2
    edits = {
        "edit_rows": torch.tensor([0, -1, 1, 2, -1, 1, 0, 2, -1, 0], dtype=torch.int32),
        "marks": marks_of([[(3, SEEN | 2), (150, SEEN), (9, STOP)], [(0, STOP)], [(7, SEEN | 1)]], 151),
        "penalties": torch.tensor([[0.4, -0.7, 1.5], [0.0, 0.0, 1.0], [1.0, 2.0, 1e-6]]),
        "left": torch.tensor([1, 0, 0], dtype=torch.int32),
    }
    yield Case("edits", draw_args(logits, rows, **edits))
    yield Case("edits-bfloat16", draw_args(logits.to(torch.bfloat16), rows, **edits))
    bias = torch.zeros(3, 151)
    bias[0, 5], bias[2, 7] = 4.0, -1e30
    allowed = torch.randint(-(2**31), 2**31, (len(rows), 5), generator=generator).to(torch.int32)
    # Row 0 may draw nothing, row 1 the last id alone.
    allowed[0], allowed[1] = 0, torch.tensor([0, 0, 0, 0, 1 << 22])
    yield Case("edits-bias-mask", draw_args(logits, rows, **edits, bias=bias, allowed=allowed))
    yield Case("edits-greedy", draw_args(logits, RowOf(greedy=True), **edits, bias=bias))
    yield Case("mask", draw_args(logits, RowOf(1.2, top_p=0.9), allowed=allowed))


def greedy() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 1), (1, 32000), (3, 151), (64, 129280 // 64), (0, 32)):
        yield Case(f"{rows}x{vocab}", (torch.randn(rows, vocab, generator=generator),))
    ties = torch.zeros(4, 33)
    ties[1, 7] = ties[1, 20] = 5.0
    ties[2, 32] = ties[2, 0] = 1e4
    ties[3] = -1e4
    yield Case("ties", (ties,))
    ugly = torch.randn(7, 5000, generator=generator)
    ugly[0] = -math.inf
    ugly[1, 3] = ugly[1, 4500] = math.nan
    ugly[2] = math.nan
    ugly[3, 5:] = -math.inf
    ugly[4, 4999] = math.inf
    ugly[5], ugly[5, 2], ugly[5, 4000] = -0.0, 0.0, -0.0
    ugly[6, 7], ugly[6, 4999] = math.inf, -math.nan
    yield Case("inf-nan-many-blocks", (ugly,))
    yield Case("inf-nan", (ugly[:, :65].contiguous(),))
    yield Case("bfloat16", (ugly.to(torch.bfloat16),))
    yield Case("extremes", (torch.tensor([[-3.4e38, -3.3e38], [1e-40, -1e-40], [-1e-45, -2e-45]]),))
    yield Case("strided", (torch.randn(40, 6, generator=generator).t(),))
