"""Tensors without contents."""

from __future__ import annotations

import torch
from torch import Tensor


def bfloat16s(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """One uninitialised bfloat16 tensor per shape."""
    return [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
