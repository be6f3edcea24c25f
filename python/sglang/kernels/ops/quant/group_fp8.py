"""Eight-bit floats with scales by blocks: rows quantised by groups of 128, and their product with 128x128 blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, triton_impl
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

GROUP = 128
# Rows past which cuBLAS is ahead of the tiles below (2 times from 1024 on; measured in the same run), and the multiple
# of rows that it is given.
LIBRARY_MIN_ROWS = 32
LIBRARY_ROWS = 16
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# By architecture ("": any other) rows up to which a tile serves, and the tile. benchmark/kernels/tune_linear.py over
# V3's projections on one H100 80GB, triton 3.6.0, 2026-11-22; gfx takes the same, never timed, but on gfx942 two
# programs of 64 rows share the 64 KiB, so that one multiplies while the other scales.
_UP_TO_32 = (
    (16, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 5}),
    (32, {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 5}),
)
LINEAR_TILES: dict[str, tuple[tuple[int | None, dict[str, int]], ...]] = {
    "": (
        *_UP_TO_32,
        (128, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 4}),
        (None, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 16, "num_warps": 4, "num_stages": 3}),
    ),
    "gfx942": (
        *_UP_TO_32,
        (128, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}),
        (None, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 16, "num_warps": 4, "num_stages": 2}),
    ),
}
# One row: bytes alone count, so no matrix unit. benchmark/kernels/tune_linear.py over V3's projections on one H200,
# triton 3.6.0, 2026-11-30: 7.6 to 67 us where the tiles above take 21.6 to 84; gfx takes the same, never timed.
ONE_ROW_TILE = {"BLOCK_N": 2, "BLOCK_K": 1024, "num_warps": 2}
# Few rows, where whole groups of columns side by side hide the way to memory (measured with the former): rows up to
# which they serve, and the first tile whose rows, least columns and most outputs fit.
FEW_ROWS = {"sm_90": 32}
FEW_ROWS_TILES = (
    (2048, 4095, {"BLOCK_M": 16, "BLOCK_N": 16, "GROUPS": 16, "num_warps": 4, "num_stages": 3}),
    (2048, None, {"BLOCK_M": 16, "BLOCK_N": 32, "GROUPS": 4, "num_warps": 4, "num_stages": 4}),
    (0, None, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 8, "num_stages": 3}),
    (2048, 16384, {"BLOCK_M": 32, "BLOCK_N": 16, "GROUPS": 4, "num_warps": 4, "num_stages": 3}),
    (2048, None, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 4}),
    (0, None, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 6}),
)


class QuantizedRows(NamedTuple):
    """Rows for products of 8-bit weights: q [N, K], scale [N, K / 128], the ``dtype`` that products are to have, and
    the rows as they were [N, K], where their maker keeps these."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype
    plain: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.q.shape


def fp8_dtype(arch: str) -> torch.dtype:
    """The eight-bit float that the matrix units of ``arch`` multiply: FNUZ on gfx942, OCP elsewhere."""
    return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn


def quantize_groups_torch(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale = max(|x|, 1e-10) / largest`` over each group of 128 columns, ``q = x / scale`` rounded to ``dtype``.

    x [N, K] float with K a multiple of 128, dtype an 8-bit float -> q [N, K] dtype, scale [N, K / 128] float32. One NaN
    makes its group and the scale NaN, so that what is made of it is NaN too.
    """
    rows, columns = x.shape
    if columns % GROUP:
        raise ValueError(f"rows of {columns} columns cannot be cut into groups of {GROUP}")
    largest = torch.finfo(dtype).max
    groups = x.float().view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / largest
    q = (groups / scale).clamp(-largest, largest).to(dtype)
    return q.view(rows, columns), scale.squeeze(-1)


def dequantize_blocks(w: Tensor, scale: Tensor) -> Tensor:
    """w [R, K] 8-bit, scale [ceil(R / 128), ceil(K / 128)] float32 of its 128x128 blocks -> [R, K] float32."""
    wide = scale.repeat_interleave(GROUP, 0)[: w.shape[0]].repeat_interleave(GROUP, 1)[:, : w.shape[1]]
    return w.float() * wide


def block_fp8_linear_torch(
    x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``x w^T`` with x quantised by groups to w's dtype and both scaled back, summed in float32.

    x [N, K] float, w [R, K] 8-bit, w_scale [ceil(R / 128), K / 128] float32 -> [N, R] in x's dtype. DeepSeek-V3 report,
    section 3.3.2 (fine-grained quantisation). Rows that are quantised already come in w's dtype with their
    x_scale [N, K / 128] float32 and the ``dtype`` of the result.
    """
    dtype = x.dtype if dtype is None else dtype
    return scaled_product(*with_scales(x, x_scale, w.dtype), w, w_scale).to(dtype)


def with_scales(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows x as they are if their ``scale`` is given, else quantised to ``dtype``."""
    return quantize_groups_torch(x, dtype) if scale is None else (x, scale)


def scaled_product(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The product of quantised rows q [N, K] with ``w``, both scaled back -> [N, R] float32."""
    rows = q.float() * scale.repeat_interleave(GROUP, 1)
    return rows @ dequantize_blocks(w, w_scale).t()


def empty_quantized(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """q [rows, columns] and its scale as a product of so many rows reads them best.

    Past LIBRARY_MIN_ROWS scales are contiguous by columns, and both are in room for a multiple of LIBRARY_ROWS rows.
    """
    groups = columns // GROUP
    if rows <= LIBRARY_MIN_ROWS:
        q = torch.empty(rows, columns, dtype=dtype, device=device)
        return q, torch.empty(rows, groups, dtype=torch.float32, device=device)
    room = cdiv(rows, LIBRARY_ROWS) * LIBRARY_ROWS
    scale = torch.empty(groups, room, dtype=torch.float32, device=device).t()
    return torch.empty(room, columns, dtype=dtype, device=device)[:rows], scale[:rows]


def quantize_groups_triton(x: Tensor, dtype: torch.dtype, for_product: bool = False) -> tuple[Tensor, Tensor]:
    """``for_product``: as ``empty_quantized`` lays them out, else dense."""
    from sglang.kernels.ops.quant.group_fp8_triton import quantize_groups_kernel

    rows, columns = x.shape
    if for_product:
        q, scale = empty_quantized(rows, columns, dtype, x.device)
    else:
        q = torch.empty(rows, columns, dtype=dtype, device=x.device)
        scale = torch.empty(rows, columns // GROUP, dtype=torch.float32, device=x.device)
    groups = rows * (columns // GROUP)
    if groups:
        block = 1 if groups < 1024 else 8
        quantize_groups_kernel[(cdiv(groups, block),)](
            x, q, scale, groups, columns // GROUP, x.stride(0), scale.stride(0), scale.stride(1),
            LARGEST=torch.finfo(dtype).max, BLOCK=block, num_warps=1 if block == 1 else 4, **early_start(),
        )  # fmt: skip
    return q, scale


def linear_tile(rows: int, width: int, k_dim: int, arch: str, dense_scale: bool = True) -> dict[str, int]:
    """The tile that serves ``rows`` rows of ``k_dim`` columns and ``width`` outputs on ``arch``.

    ``dense_scale``: the rows' scales are contiguous, as the forms of one and of few rows read them.
    """
    if rows == 1 and dense_scale:
        return ONE_ROW_TILE
    if rows <= FEW_ROWS.get(arch, 0) and dense_scale:
        fits = (t for least, most, t in FEW_ROWS_TILES if k_dim >= least and (most is None or width <= most))
        return next(tile for tile in fits if rows <= tile["BLOCK_M"])
    tiles = LINEAR_TILES.get(arch, LINEAR_TILES[""])
    return next(tile for limit, tile in tiles if limit is None or rows <= limit)


def block_product(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, tile: dict[str, int] | None = None
) -> Tensor:
    """The product of quantised rows with w, one launch -> [N, R] in ``dtype``.

    ``tile`` None takes the table's. One without BLOCK_M is of one row, and one with GROUPS of at most BLOCK_M rows.
    """
    from sglang.kernels.ops.quant.group_fp8_triton import (
        block_fp8_linear_kernel,
        few_rows_fp8_linear_kernel,
        one_row_fp8_linear_kernel,
    )

    (rows, k_dim), width = q.shape, w.shape[0]
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    if tile is None:
        tile = linear_tile(rows, width, k_dim, current_platform.arch, scale.is_contiguous())
    tiles = cdiv(width, tile["BLOCK_N"])
    if "BLOCK_M" not in tile:
        one_row_fp8_linear_kernel[(tiles,)](
            q, scale, w, w_scale, out, width, k_dim, EVEN_K=k_dim % tile["BLOCK_K"] == 0, **tile, **early_start()
        )
    elif "GROUPS" in tile:
        few_rows_fp8_linear_kernel[(tiles,)](
            q, scale, w, w_scale, out, rows, width, k_dim,
            EVEN_K=k_dim % (GROUP * tile["GROUPS"]) == 0, **tile, **early_start(),
        )  # fmt: skip
    else:
        row_tiles = cdiv(rows, tile["BLOCK_M"])
        block_fp8_linear_kernel[(row_tiles * tiles,)](
            q, scale, w, w_scale, out, rows, width, k_dim, *scale.stride(), row_tiles, tiles, **tile, **early_start()
        )
    return out


def block_fp8_linear_triton(
    x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = x.dtype if dtype is None else dtype
    if not x.shape[0]:
        return x.new_empty(0, w.shape[0], dtype=dtype)
    q, scale = quantize_groups_triton(x, w.dtype) if x_scale is None else (x, x_scale)
    return block_product(q, scale, w, w_scale, dtype)


def block_fp8_linear_cublas(
    x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """cuBLAS' product with scales of 1x128 and 128x128 blocks, rows padded to what it takes."""
    from torch.nn.functional import ScalingType, scaled_mm

    rows, columns = x.shape
    q, scale = quantize_groups_triton(x, w.dtype, for_product=True) if x_scale is None else (x, x_scale)
    room = scale.stride(1)
    out = scaled_mm(
        q.as_strided((room, columns), (columns, 1)), w.t(),
        scale.as_strided((room, columns // GROUP), (1, room)), ScalingType.BlockWise1x128,
        w_scale.t(), ScalingType.BlockWise128x128, output_dtype=dtype or x.dtype,
    )  # fmt: skip
    return out[:rows]


def _accepts_library(
    x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> bool:
    # A row of weight scales must start at 16 bytes.
    aligned = w.shape[0] % 16 == 0 and w_scale.shape[1] % 4 == 0
    many = x.shape[0] > LIBRARY_MIN_ROWS and (dtype or x.dtype) == torch.bfloat16
    room = cdiv(x.shape[0], LIBRARY_ROWS) * LIBRARY_ROWS
    laid_out = x_scale is None or (x.is_contiguous() and x_scale.stride() == (1, room))
    return many and aligned and laid_out and _accepts_linear(x, w, w_scale, x_scale, dtype)


def _accepts_quantize(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype in FLOATS and x.stride(1) == 1 and x.shape[1] % GROUP == 0 and dtype in FP8_DTYPES


def _accepts_linear(
    x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> bool:
    native = w.dtype == fp8_dtype(current_platform.arch) and w.is_contiguous() and w_scale.is_contiguous()
    if x_scale is None:
        return native and _accepts_quantize(x, w.dtype)
    return native and x.dtype == w.dtype and x.is_contiguous() and dtype in FLOATS


quantize_groups = Op(
    "quant.quantize_groups",
    triton_impl(quantize_groups_triton, _accepts_quantize),
    Impl("torch", quantize_groups_torch),
)
block_fp8_linear = Op(
    "quant.block_fp8_linear",
    Impl(
        "cublas",
        block_fp8_linear_cublas,
        kinds={"cuda"},
        archs=("sm_90",),
        package="triton",
        needs_device=True,
        enabled=lambda: hasattr(torch.nn.functional, "scaled_mm"),
        accepts=_accepts_library,
    ),
    triton_impl(block_fp8_linear_triton, _accepts_linear),
    Impl("torch", block_fp8_linear_torch),
)
