"""FAKE weight layout of the matrix kernels."""

from __future__ import annotations

from typing import Any

import torch


def _tiles(x: torch.Tensor, layout: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = layout[0], 2 * layout[1]
    vector = 16 // x.element_size()
    assert x.shape[-2] % rows == 0, f"{x.shape[-2]} rows are no multiple of {rows}"
    assert x.shape[-1] % columns == 0, f"{x.shape[-1]} columns are no multiple of {columns}"
    return (-1, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns // vector, vector)


def shuffle_weight(x: torch.Tensor, layout: tuple[int, int] = (16, 16), use_int4: bool = False) -> torch.Tensor:
    """x [..., N, K] in tiles of 16 rows and 32 columns, row by row inside vectors of 16 bytes; a new tensor, marked."""
    if use_int4:
        raise NotImplementedError("the fake lays out no int4")
    moved: Any = x.view(_tiles(x, layout)).permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)
    moved.is_shuffled = True
    return moved


def unshuffled(x: torch.Tensor, layout: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """The inverse (not the vendor's: its kernels read the layout)."""
    experts, row_tiles, rows, column_tiles, vectors, vector = _tiles(x, layout)
    tiled = x.view(experts, row_tiles, column_tiles, vectors, rows, vector)
    return tiled.permute(0, 1, 4, 2, 3, 5).reshape(x.shape)
