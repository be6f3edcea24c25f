"""Random choice that depends only on seed and position, not on the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """One round of a 32-bit integer hash kept in int64 (the lowbias32 constants of C. Wellons' hash prospector)."""
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def uniform_from_seed_torch(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions (of the token to be drawn) [B] int64 -> [B] float64 in [0, 1) with 32 random bits."""
    mask = 0xFFFFFFFF
    low, high = seeds & mask, (seeds >> 32) & mask
    word = _mix(_mix(_mix(low) ^ high) ^ (positions & mask))
    return word.to(torch.float64) / 2.0**32


def seeded_sample_torch(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Sample one id per row by inverting the cumulative distribution in id order.

    probs [B, V] float, non-negative, rows need not sum to 1 but must hold a positive entry; seeds, positions [B] int64
    -> [B] int64 in [0, V), always of positive probability.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform_from_seed_torch(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)
    # A target that rounds up to the total would be past the end: take the id that completes the total.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(ids, last).squeeze(1)
