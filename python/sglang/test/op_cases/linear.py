"""Cases of the ops ``linear.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case


def dense() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, width, columns in ((1, 33, 1100), (1, 1, 8), (0, 5, 16), (7, 64, 96)):
        wide = torch.randn(rows, columns + 3, generator=generator)
        w = torch.randn(width, columns, generator=generator) / columns**0.5
        yield Case(f"{rows}x{width}x{columns}", (wide[:, :columns], w))
        yield Case(f"{rows}x{width}x{columns}-bias", (wide[:, :columns], w, torch.randn(width, generator=generator)))
    yield Case("nan-row", (torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), torch.ones(3, 2)))
