"""FAKE layout of the scales of MXFP4 weights, and what they and their codes stand for."""

from __future__ import annotations

import torch

# Rows and columns of scales that the kernels read together.
_ROWS, _COLUMNS = 256, 8
_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e8m0_shuffle(scale: torch.Tensor) -> torch.Tensor:
    """scale [R, C] in pairs of 16 rows and of 4 columns, column by column; padded to whole tiles with old bytes."""
    assert scale.ndim == 2, "scale must be a 2D tensor"
    rows, columns = (-(-size // tile) * tile for size, tile in zip(scale.shape, (_ROWS, _COLUMNS), strict=True))
    padded = torch.full((rows, columns), 0xFF, dtype=torch.uint8).view(scale.dtype)
    padded[: scale.shape[0], : scale.shape[1]] = scale
    tiles = padded.view(rows // 32, 2, 16, columns // 8, 2, 4)
    return tiles.permute(0, 3, 5, 2, 4, 1).contiguous().view(rows, columns)


def unshuffled_scale(scale: torch.Tensor) -> torch.Tensor:
    """The inverse, of whole tiles (not the vendor's: its kernels read the layout)."""
    rows, columns = scale.shape
    tiles = scale.view(rows // 32, columns // 8, 4, 16, 2, 2)
    return tiles.permute(0, 5, 3, 1, 4, 2).reshape(rows, columns)


def weights_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [..., K / 2] and scale [..., K / 32] as bytes -> [..., K] float32."""
    pairs = torch.stack((codes % 16, codes // 16), dim=-1).flatten(-2).long()
    signed = torch.where(pairs >= 8, -_VALUES[pairs % 8], _VALUES[pairs % 8])
    powers = torch.exp2(scale.float() - 127)
    return signed * powers.repeat_interleave(32, -1)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as a four-bit product sees rows: 32 under a power of two, nearest number, ties to even."""
    groups = x.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    # The fraction of the largest number is rounded to one bit first.
    exponent = torch.floor(torch.log2(largest.clamp(min=1e-38) * (8 / 7))) - 2
    power = torch.exp2(exponent)
    size = (groups / power).abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    near = (torch.round(size / step) * step).clamp(max=6.0)
    return (near.copysign(groups) * power).flatten(-2)
