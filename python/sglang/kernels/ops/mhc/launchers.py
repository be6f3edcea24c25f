"""Launchers of mHC's two Triton bodies: leave a sub-block, enter the next one, or both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2
from sglang.srt.platforms import current_platform

# Streams of a token, columns of a block of the first kernel, and the widest row that one program of the second holds.
STREAMS, BLOCK_D, MAX_WIDTH = 4, 64, 8192
# Programs of the first kernel that keep a GPU busy: beyond them one program takes several blocks of columns.
ENOUGH_PROGRAMS = 512

# Streams of which few rows meet the matrix in one product: others have no product of many columns at once.
AT_ONCE_DTYPES = (torch.bfloat16,)
# Where a program's loads see what other lanes stored before a barrier. Triton 3.9's for AMD does not wait for stores.
STORES_SEEN_BEHIND_BARRIERS = ("cuda",)


class Parts(NamedTuple):
    """Partial sums of each slice of columns: products [S, N, m] and squares [S, N] float32, the only scratch."""

    products: Tensor
    squares: Tensor


class Tile(NamedTuple):
    """Rows of a program of the first kernel, blocks of columns of it, and the slices that make up a row."""

    rows: int
    steps: int
    splits: int


def tile_of(num_rows: int, width: int) -> Tile:
    """How the first kernel cuts ``num_rows`` rows of ``width`` columns; up to 64 rows do not change each other's."""
    rows = 16 if num_rows <= 256 else 32
    blocks = cdiv(width, BLOCK_D)
    steps = min(blocks, next_power_of_2(cdiv(cdiv(num_rows, rows) * blocks, ENOUGH_PROGRAMS)))
    return Tile(rows, steps, cdiv(blocks, steps))


def make_parts(num_rows: int, width: int, mixes: int, device: torch.device) -> Parts:
    """Uninitialised partial sums for ``num_rows`` rows: they live for one call, on its stream, and in its graph."""
    splits = tile_of(num_rows, width).splits
    products = torch.empty(splits, num_rows, mixes, dtype=torch.float32, device=device)
    return Parts(products, torch.empty(splits, num_rows, dtype=torch.float32, device=device))


def mix_streams(
    x: Tensor, row: Tensor | None = None, post: Tensor | None = None, comb: Tensor | None = None,
    fn: Tensor | None = None, parts: Parts | None = None,
) -> Tensor:  # fmt: skip
    """With row, post and comb: the new streams that ``hc_post`` gives, else x; with fn: their ``parts`` are written."""
    from sglang.kernels.ops.mhc.mhc_triton import mix_streams_kernel

    num_rows, _, width = x.shape
    out = x if row is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile = tile_of(num_rows, width)
    mixes = 0 if fn is None else fn.shape[0]
    reads_back = fn is not None and row is not None and current_platform.kind in STORES_SEEN_BEHIND_BARRIERS
    # With few rows most of what is read is the matrix, which is then held in registers completely.
    at_once = fn is not None and (row is None or reads_back) and x.dtype in AT_ONCE_DTYPES and tile.rows == 16
    mix_streams_kernel[(cdiv(num_rows, tile.rows), tile.splits)](
        row, x, post, comb, fn, out, *(parts or (None, None)),
        num_rows, width, 0 if row is None else row.stride(0), x.stride(0), x.stride(1),
        POST=row is not None, PRE=fn is not None, READ_BACK=reads_back, AT_ONCE=at_once,
        MIXES=mixes, MIX_BLOCK=max(16, next_power_of_2(mixes)),
        STEPS=tile.steps, BLOCK_R=tile.rows, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return out


def join_streams(
    x: Tensor, parts: Parts, base: Tensor, scale: Tensor, rms_eps: float, hc_eps: float, iterations: int = 0,
    norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The row [N, D] of streams x [N, 4, D], normed if asked for, and post [N, 4] and comb [N, 4, 4] float32.

    ``parts`` are those of x. Of four coefficients, and not 24, there is the row alone: post and comb hold nothing.
    """
    from sglang.kernels.ops.mhc.mhc_triton import join_streams_kernel

    num_rows, n, width = x.shape
    splits, _, mixes = parts.products.shape
    row = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    ways_out = num_rows if mixes > n else 0
    post, comb = (torch.empty(ways_out, *shape, device=x.device, dtype=torch.float32) for shape in ((n,), (n, n)))
    if num_rows:
        block = next_power_of_2(width)
        warps = 4 if block <= 4096 else 8
        groups = cdiv(ways_out, warps)
        join_streams_kernel[(groups + num_rows,)](
            *parts, base, scale, x, norm_weight, row, post, comb,
            num_rows, groups, width, splits, x.stride(0), x.stride(1), rms_eps, hc_eps, norm_eps,
            MIXES=mixes, ITERATIONS=iterations, NORM=norm_weight is not None,
            SPLITS=max(8, next_power_of_2(splits)), TOKENS=warps, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return row, post, comb


def fits_streams(x: Tensor) -> bool:
    """Whether the kernels read streams x [N, n, D]: four of them, of whole blocks of columns, dense by column."""
    whole = x.shape[1] == STREAMS and x.shape[2] % BLOCK_D == 0 and 0 < x.shape[2] <= MAX_WIDTH
    return whole and x.dtype in FLOATS and x.stride(2) == 1


def fits_way_out(row: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> bool:
    """Whether they also read what ``hc_post`` takes."""
    floats = all(part.dtype == torch.float32 and part.is_contiguous() for part in (post, comb))
    return fits_streams(x) and floats and row.dtype == x.dtype and row.stride(1) == 1


def fits_way_in(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> bool:
    """Whether they also read the parameters of ``hc_pre`` or ``hc_head``."""
    floats = all(part.dtype == torch.float32 and part.is_contiguous() for part in (fn, base, scale))
    return fits_streams(x) and floats and fn.shape[1] == STREAMS * x.shape[2]
