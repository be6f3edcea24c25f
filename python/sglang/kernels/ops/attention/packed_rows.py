"""Rows of compressed attention in their cache: plain ones, or 8-bit floats with scales of their own in pages."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS
from sglang.kernels.ops.attention.kv_cache import is_cache_dtype, read_rows, write_latent_torch
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.srt.platforms import current_platform

# Columns that share a scale, and the smallest of their largest numbers that a scale is made for.
GROUP = 64
SMALLEST = 1e-8
# What stands for NaN among exponents of 8 bits (OCP microscaling formats, 5.4.1).
NAN_EXPONENT = 255


def store_rows_torch(rows: Tensor, row_ids: Tensor, cache: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
    """Write rows [N, D] float to rows ``row_ids`` [N] int64 of a cache; returns what was written to.

    Plain: cache [S, D], as ``write_latent_torch``. In pages of R rows, of any stride between pages, row i stands at
    [i // R, i % R]:
    - rows: cache [P, R, D + T] of an 8-bit float, whose first D - T bytes are the first columns and whose last 2 T the
      last T as bfloat16; scales [P, R, >= (D - T) / 64] uint8: the exponent, plus 127, of groups of 64 columns. A
      column is its float times two to the smallest power by which the group's largest number fits.
    - keys: cache [P, R, D] of an 8-bit float, scales [P, R] float32: the largest number over that of the float.
    A group of which a number is infinite or NaN is 0 with a scale that is NaN. Row 0 may repeat, and holds any of its
    rows then. FNUZ's NaN is never written.
    """
    if scales is None:
        return (write_latent_torch(rows, cache, row_ids),)
    per_page, dim = cache.shape[1:]
    page, place = row_ids // per_page, row_ids % per_page
    if scales.dtype == torch.float32:
        packed, scales[page, place] = _pack_keys(rows, cache.dtype)
    else:
        packed, exponents = _pack_rows(rows, dim - rows.shape[1], cache.dtype)
        scales[..., : exponents.shape[1]][page, place] = exponents
    cache.view(torch.uint8)[page, place] = packed
    return cache, scales


def _pack_rows(rows: Tensor, tail: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> bytes [N, D + tail] and exponents [N, G], both uint8."""
    plain = rows.shape[1] - tail
    groups = torch.nn.functional.pad(rows[:, :plain].float(), (0, -plain % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2)
    fraction, exponent = torch.frexp(largest.clamp(min=SMALLEST))
    most_fraction, most_exponent = math.frexp(torch.finfo(dtype).max)
    power = exponent - most_exponent + (fraction > most_fraction)
    finite = largest.isfinite()
    values = torch.where(finite.unsqueeze(2), torch.ldexp(groups, -power.unsqueeze(2)), 0.0)
    bits = values.to(dtype).view(torch.uint8).flatten(1)[:, :plain]
    turned = rows[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
    return torch.cat((bits, turned), dim=1), torch.where(finite, power + 127, NAN_EXPONENT).to(torch.uint8)


def _pack_keys(keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> bytes [N, D] uint8 and scales [N] float32."""
    most = torch.finfo(dtype).max
    largest = keys.float().abs().amax(1)
    scale = largest.clamp(min=SMALLEST) / most
    finite = largest.isfinite()
    values = torch.where(finite.unsqueeze(1), (keys.float() / scale.unsqueeze(1)).clamp(-most, most), 0.0)
    return values.to(dtype).view(torch.uint8), torch.where(finite, scale, torch.nan)


def load_rows(cache: Tensor, scales: Tensor | None, row_ids: Tensor, dim: int) -> Tensor:
    """Rows [M, dim] float32 of a cache as ``store_rows_torch`` describes it, at row_ids [M]."""
    if scales is None:
        return read_rows(cache, row_ids, torch.float32)
    page, place = row_ids // cache.shape[1], row_ids % cache.shape[1]
    found = cache.view(torch.uint8)[page, place]
    scale = scales[page, place]
    if scales.dtype == torch.float32:
        return found.view(cache.dtype).float() * scale.unsqueeze(1)
    plain = 2 * dim - cache.shape[2]
    values = found[:, :plain].view(cache.dtype).float()
    # The exponent field of a float32; that of NaN gives infinity, and infinity times 0 is NaN.
    wide = (scale.int() << 23).view(torch.float32).repeat_interleave(GROUP, 1)[:, :plain]
    turned = found[:, plain:].contiguous().view(torch.bfloat16).float()
    return torch.cat((values * wide, turned), dim=1)


class RowLayout(NamedTuple):
    """Compile-time arguments of kernels that write rows: see ``store_row``."""

    kind: int
    per_page: int
    width: int
    num_scales: int

    @classmethod
    def of(cls, cache: Tensor, scales: Tensor | None) -> RowLayout:
        """That of a cache as ``store_rows_torch`` has it."""
        if scales is None:
            return cls(0, 1, 0, 0)
        keys = scales.dtype == torch.float32
        return cls(2 if keys else 1, cache.shape[1], cache.shape[2], 1 if keys else scales.shape[2])

    def constants(self) -> dict[str, int]:
        """By the names that kernels give them."""
        return {"KIND": self.kind, "PER_PAGE": self.per_page, "WIDTH": self.width, "NUM_SCALES": self.num_scales}


def is_packed(cache: Tensor, scales: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels read and write this cache from and to rows of ``dtype``."""
    if scales is None:
        return cache.stride(1) == 1 and is_cache_dtype(cache.dtype, dtype)
    packed = cache.stride(2) == 1 and cache.stride(1) == cache.shape[2]
    dense = scales.stride(1) == (1 if scales.dim() == 2 else scales.shape[2])
    return packed and dense and dtype in FLOATS and cache.dtype == fp8_dtype(current_platform.arch)
