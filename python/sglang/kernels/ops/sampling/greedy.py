"""Greedy choice: the index of the largest logit of each row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.spec import Case, Impl, Op


def greedy_torch(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest logit in each row.

    logits [B, V] float, any strides -> [B] int64, always in [0, V); ties take the first. A row of -inf gives 0; a row
    that holds NaN gives the index of its first NaN (the caller refuses such a row, see ``Sampler``).
    """
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    best = logits.amax(dim=-1, keepdim=True)
    # torch.argmax leaves ties open; the first index of the maximum is made explicit.
    hits = (logits == best) | logits.isnan()
    return hits.to(torch.uint8).argmax(dim=-1)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 1), (1, 32000), (3, 151), (64, 129280 // 64), (0, 32)):
        yield Case(f"{rows}x{vocab}", (torch.randn(rows, vocab, generator=generator),))
    ties = torch.zeros(4, 33)
    ties[1, 7] = ties[1, 20] = 5.0
    ties[2, 32] = ties[2, 0] = 1e4
    ties[3] = -1e4
    yield Case("ties", (ties,))
    ugly = torch.randn(4, 65, generator=generator)
    ugly[0] = float("-inf")
    ugly[1, 3] = float("nan")
    ugly[2] = float("nan")
    ugly[3, 5:] = float("-inf")
    yield Case("inf-nan", (ugly,))
    yield Case("strided", (torch.randn(40, 6, generator=generator).t(),))


greedy_sample = Op("sampling.greedy", Impl("torch", greedy_torch), cases=_cases)
