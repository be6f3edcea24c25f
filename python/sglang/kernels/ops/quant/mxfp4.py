"""MXFP4: four-bit floats e2m1, packed two to a byte along a row, with a scale that is a power of two for each 32."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of a row that share a scale, and entries of a byte: the first is its low half.
GROUP = 32
PACKED = 2
# A number by the low three bits of its code; the fourth is its sign. OCP Microscaling Formats 1.0, table 5.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scale byte b means 2^(b - BIAS), and NaN is no number.
BIAS = 127
NAN_BYTE = 255
# The largest scale byte with which every code is a float32.
LARGEST_FLOAT32 = 252
# Scale bytes at which placed codes become numbers by one product of bfloat16, 2^-62 of each: none overflows, none is
# subnormal.
NARROW = (64, 190)
# Of the four codes in 16 placed bits: where the sign is, and the lowest of the other three.
PLACES = ((15, 6), (12, 3), (14, 0), (13, 9))
# Rows and columns of a matrix whose placed codes are contiguous, and the same for scales.
GRANULE = (64, 128)


def quantize_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest numbers, ties to the even code, and scales 2^(floor(log2(m)) - 2) with m the largest of a group,
    its fraction rounded to one bit.

    w [..., K] float, K a multiple of 32 -> codes [..., K / 2] and scales [..., K / 32], both uint8. Rounding m first
    keeps 7 .. 8 from being cut to 6, as Quark does ("even"). A group of zeros has scale 1, one with inf or NaN has NaN.
    """
    if w.shape[-1] % GROUP:
        raise ValueError(f"rows of {w.shape[-1]} entries cannot be cut into groups of {GROUP}")
    groups = w.float().unflatten(-1, (-1, GROUP))
    bits = groups.abs().amax(-1).contiguous().view(torch.int32)
    # A quarter of the leading bit, added to the fraction, carries from 1.75 on.
    exponent = (bits + (1 << 21)) >> 23
    scale = (exponent - 2).clamp(0, NAN_BYTE - 1)
    scale = torch.where(bits == 0, BIAS, torch.where(bits >= 0x7F800000, NAN_BYTE, scale)).to(torch.uint8)
    # Byte 0 and subnormal numbers: the factor 2^(127 - b) is exact for every b below 255.
    scaled = torch.ldexp(groups.double(), (BIAS - scale.to(torch.int32)).unsqueeze(-1)).flatten(-2)
    codes = round_e2m1(scaled)
    return codes[..., ::2] | (codes[..., 1::2] << 4), scale


def round_e2m1(x: Tensor) -> Tensor:
    """The code of the nearest number of each entry, ties to the even code; uint8 below 16. Past 6 it is 6."""
    size = x.abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for code, (low, high) in enumerate(zip(E2M1, E2M1[1:], strict=False)):
        middle = (low + high) / 2
        # Between an even code and the odd one above it a tie stays below.
        codes += (size > middle) if code % 2 == 0 else (size >= middle)
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


def unpack_eighths(codes: Tensor, scale: Tensor) -> Tensor:
    """An eighth of each number, which every pair of code and scale byte has in float32, exactly.

    codes [..., K / 2], scale [..., K / 32], both uint8 -> [..., K] float32.
    """
    table = torch.tensor([value / 8 for value in E2M1], device=codes.device)
    table = torch.cat((table, -table))
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return table[pairs.int()] * scales_of(scale).repeat_interleave(GROUP, -1)


def scales_of(scale: Tensor) -> Tensor:
    """Scale bytes -> float32: 2^(b - 127), of which 2^-127 is subnormal, and NaN."""
    bits = scale.to(torch.int32) << 23
    return torch.where(scale == 0, 1 << 22, torch.where(scale == NAN_BYTE, 0x7FC00000, bits)).view(torch.float32)


def dequantize_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [..., K / 2], scale [..., K / 32], both uint8 -> [..., K] float32; inf past it (bytes 253 and 254)."""
    return unpack_eighths(codes, scale) * 8.0


def place_codes(codes: Tensor) -> Tensor:
    """The same codes where few instructions make bfloat16 of two of them at once, and tiles are in one piece.

    codes [R, K / 2] uint8, R and K whole GRANULEs -> the same. Of the eight 16 bits of a group, the i-th have its
    numbers i, i + 8, i + 16 and i + 24 as PLACES says: after at most a shift and a product, the bits of a code are the
    sign, the last two of the exponent and the first of the fraction of 2^-126 times its number (0.5 is subnormal).
    A granule's row has the first two 16 bits of each of its four groups first, which are one thread's in a product,
    then the next two of each.
    """
    numbers = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    bits = torch.zeros(codes.shape[0], codes.shape[1] // 2, dtype=torch.int32, device=codes.device)
    for code, (sign, low) in zip(numbers.unflatten(-1, (-1, 4, GROUP // 4)).unbind(-2), PLACES, strict=True):
        bits |= ((code >> 3 << sign) | ((code & 7) << low)).flatten(-2)
    bits = bits.unflatten(-1, (-1, GRANULE[1] // GROUP, 4, 2)).transpose(-3, -2).flatten(-4)
    return _granules(torch.stack((bits & 255, bits >> 8), dim=-1).to(torch.uint8).flatten(-2), GRANULE[1] // PACKED)


def place_scales(scale: Tensor) -> Tensor:
    """Scale bytes [R, K / 32] -> the same, as ``place_codes`` puts the codes."""
    return _granules(scale, GRANULE[1] // GROUP)


def _granules(rows: Tensor, width: int) -> Tensor:
    """Bytes [R, B] such that those of GRANULE rows and ``width`` columns form one piece, row by row."""
    return rows.unflatten(0, (-1, GRANULE[0])).unflatten(2, (-1, width)).transpose(1, 2).reshape(rows.shape)
