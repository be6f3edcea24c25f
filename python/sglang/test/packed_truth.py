"""Rows of compressed attention in 8 bits, decoded from their bytes one number at a time."""

from __future__ import annotations

import math
import struct

import torch


def float_of_byte(byte: int, dtype: torch.dtype) -> float:
    """The number that ``byte`` is in e4m3, OCP (bias 7, NaN 0x7F and 0xFF) or FNUZ (bias 8, NaN 0x80)."""
    fnuz = dtype == torch.float8_e4m3fnuz
    if byte == 0x80 and fnuz or byte & 0x7F == 0x7F and not fnuz:
        return math.nan
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    bias = 8 if fnuz else 7
    if exponent:
        return float(sign * (8 + fraction) * 2.0 ** (exponent - bias - 3))
    return float(sign * fraction * 2.0 ** (1 - bias - 3))


def bfloat16_of_bytes(pair: bytes) -> float:
    """The number that two bytes are as bfloat16, the low one first."""
    return float(struct.unpack("<f", b"\0\0" + pair)[0])


def true_row(values: bytes, scale: bytes | float, dim: int, dtype: torch.dtype) -> list[float]:
    """A row of ``dim`` numbers: a float is the scale of a key; bytes are exponents of 64 columns each."""
    if isinstance(scale, float):
        return [scale * float_of_byte(byte, dtype) for byte in values]
    plain = 2 * dim - len(values)
    powers = [math.nan if byte == 255 else 2.0 ** (byte - 127) for byte in scale]
    tail = [bfloat16_of_bytes(values[at : at + 2]) for at in range(plain, len(values), 2)]
    return [float_of_byte(byte, dtype) * powers[column // 64] for column, byte in enumerate(values[:plain])] + tail


def true_rows(cache: torch.Tensor, scales: torch.Tensor | None, dim: int) -> torch.Tensor:
    """All rows [S, dim] float64 of a cache as ``store_rows_torch`` has it."""
    if scales is None:
        return cache.double()
    rows = []
    raw = cache.view(torch.uint8).flatten(0, 1).tolist()
    for values, scale in zip(raw, scales.flatten(0, 1).tolist(), strict=True):
        rows.append(true_row(bytes(values), scale if isinstance(scale, float) else bytes(scale), dim, cache.dtype))
    return torch.tensor(rows, dtype=torch.float64)
