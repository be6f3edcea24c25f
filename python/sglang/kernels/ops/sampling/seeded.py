"""Random choice whose draw depends on seed and position alone, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.spec import Case, Impl, Op


def _mix(x: Tensor) -> Tensor:
    """One round of a 32-bit integer hash kept in int64 (the lowbias32 constants of C. Wellons' hash prospector)."""
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def uniform_from_seed_torch(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, position).

    seeds [B] int64, positions [B] int64 (index of the token to be drawn) -> [B] float64 with 32 random bits.
    """
    mask = 0xFFFFFFFF
    low, high = seeds & mask, (seeds >> 32) & mask
    word = _mix(_mix(_mix(low) ^ high) ^ (positions & mask))
    return word.to(torch.float64) / 2.0**32


def seeded_sample_torch(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one id a row by inverting the cumulative distribution in id order.

    probs [B, V] float, non-negative, rows need not sum to 1 but must hold a positive entry; seeds, positions [B] int64
    -> [B] int64 in [0, V), always of positive probability.
    """
    cumulative = probs.to(torch.float64).cumsum(dim=-1)
    target = uniform_from_seed_torch(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # A target that rounds up to the total would fall off the end: take the last id of positive probability.
    positive = (probs > 0).to(torch.uint8)
    last = probs.shape[1] - 1 - positive.flip(-1).argmax(dim=-1)
    return torch.minimum(ids, last)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 1), (1, 7), (16, 512), (5, 129)):
        probs = torch.rand(rows, vocab, generator=generator)
        seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
        yield Case(f"{rows}x{vocab}", (probs, seeds, torch.arange(rows)))
    one_hot = torch.zeros(3, 9)
    one_hot[0, 0] = one_hot[1, 8] = one_hot[2, 4] = 1.0
    yield Case("one-hot", (one_hot, torch.tensor([0, -1, 2**63 - 1]), torch.tensor([0, 2**31, 2**33])))


seeded_sample = Op("sampling.seeded", Impl("torch", seeded_sample_torch), cases=_cases)
