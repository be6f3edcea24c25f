"""Arguments without contents at which served models call the ops of ``kernels/ops/sampling``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.sampling.check_ids import check_ids
from sglang.kernels.ops.sampling.draw import draw
from sglang.kernels.ops.sampling.greedy import greedy_sample
from sglang.kernels.spec import Op
from sglang.test.op_cases import Case
from sglang.test.op_cases.sampling import RowOf, draw_args


def draw_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Batches of logits over served models' vocabularies, without contents; the last ones of float32."""
    all_three = RowOf(0.7, 50, 0.9, 0.05)
    for rows, vocab in ((1, 102400), (128, 129280), (128, 248320)):
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
        for name, row in (("plain", RowOf()), ("filtered", all_three)):
            yield draw, Case(f"{rows}x{vocab} {name}", draw_args(logits, row))
    for vocab in (129280, 248320):
        logits = torch.empty(128, vocab, dtype=torch.bfloat16, device=device)
        edits = {
            "edit_rows": torch.empty(128, dtype=torch.int32, device=device),
            "marks": torch.empty(4, vocab, dtype=torch.int32, device=device),
            "penalties": torch.empty(4, 3, device=device),
            "left": torch.empty(4, dtype=torch.int32, device=device),
            "bias": torch.empty(4, vocab, device=device),
            "allowed": torch.empty(128, vocab // 32, dtype=torch.int32, device=device),
        }
        for name, row in (("greedy", RowOf(greedy=True)), ("plain", RowOf()), ("filtered", all_three)):
            yield draw, Case(f"128x{vocab} {name} edited", draw_args(logits, row, **edits))
    yield draw, Case("128x129280 float32", draw_args(torch.empty(128, 129280, device=device), all_three))


def greedy_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Batches of logits over served models' vocabularies, without contents."""
    for rows, vocab in ((1, 102400), (128, 129280), (128, 248320), (512, 129280)):
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.empty(rows, vocab, dtype=dtype, device=device)
            yield greedy_sample, Case(f"{rows}x{vocab} {dtype}", (logits,))


def check_ids_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Chosen ids of batches, without contents."""
    for rows in (1, 128, 512):
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        yield check_ids, Case(f"{rows} rows", (ids, torch.empty_like(ids), 129280))


CASES = (
    check_ids_cases,
    draw_cases,
    greedy_cases,
)
