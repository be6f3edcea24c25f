"""Rotary position embedding: the table of cosines and sines, plain or stretched by YaRN."""

from __future__ import annotations

import math

import torch
from torch import nn

from sglang.kernels.ops.rope.rotary import rotary
from sglang.srt.configs.rope import RopeConfig


def plain_inverse_frequencies(rotary_dim: int, base: float) -> torch.Tensor:
    """``base ** (-2i / R)`` for i < R/2, float32."""
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def yarn_inverse_frequencies(rotary_dim: int, base: float, rope: RopeConfig) -> torch.Tensor:
    """Frequencies stretched by ``rope.factor`` where they turn slowly, kept where they turn fast, float32 [R/2].

    Peng et al. 2023 (YaRN), section 3.2: a linear ramp between the dimensions that make ``beta_fast`` and
    ``beta_slow`` turns over the length of pretraining.
    """

    def dimension_of(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), rotary_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    plain = plain_inverse_frequencies(rotary_dim, base)
    return ramp * plain / rope.factor + (1 - ramp) * plain


def cos_sin_table(rotary_dim: int, max_position: int, base: float, rope: RopeConfig) -> torch.Tensor:
    """Cosines and sines of every position's angles, float32 [max_position, R]; raises ValueError for unknown ropes."""
    if rope.rope_type not in ("default", "yarn"):
        raise ValueError(f"rotary embedding type {rope.rope_type!r} is not supported (known: default, yarn)")
    if torch.get_default_device().type == "meta":
        # Only the size is asked for. On meta tensors torch imports its compiler for the ops below, which takes seconds.
        return torch.empty(max_position, rotary_dim, dtype=torch.float32)
    yarn = rope.rope_type == "yarn"
    frequencies = (
        yarn_inverse_frequencies(rotary_dim, base, rope) if yarn else plain_inverse_frequencies(rotary_dim, base)
    )
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.cos_sin_scale


class RotaryEmbedding(nn.Module):
    """Rotates the first ``rotary_dim`` dimensions of queries and keys by their positions.

    rotary_dim: even. max_position: positions served, in tokens. base: theta. is_neox: pairs (x_i, x_{i+R/2}), else
    (x_{2i}, x_{2i+1}). rope: "default", or "yarn", whose magnitude ratio multiplies the table.
    """

    cos_sin_cache: torch.Tensor

    def __init__(self, rotary_dim: int, max_position: int, base: float, is_neox: bool, rope: RopeConfig) -> None:
        super().__init__()
        self.is_neox = is_neox
        table = cos_sin_table(rotary_dim, max_position, base, rope)
        self.register_buffer("cos_sin_cache", table, persistent=False)

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [N] int64, q [N, Hq, D], k [N, Hk, D] -> rotated (q, k), new tensors."""
        return rotary(positions, q, k, self.cos_sin_cache, self.is_neox)
