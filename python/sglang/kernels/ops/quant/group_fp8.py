"""Eight-bit floats with scales by blocks: rows quantised by groups of 128, and their product with 128x128 blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, triton_impl
from sglang.kernels.spec import Case, Impl, Op
from sglang.srt.platforms import current_platform

GROUP = 128
# Rows past which cuBLAS is ahead of the tiles below (up to 1.2 times at 32 rows, 2 times from 1024 on; measured
# beside them), and the multiple of rows that it is given.
LIBRARY_MIN_ROWS = 16
LIBRARY_ROWS = 16
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# Rows up to which a tile serves, and the tile; gfx takes the same, never timed. benchmark/kernels/tune_linear.py over
# V3's projections on one H100 80GB, triton 3.6.0, 2026-11-22.
LINEAR_TILES = (
    (1, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 5}),
    (16, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 5}),
    (32, {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 5}),
    (128, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "num_warps": 4, "num_stages": 4}),
    (None, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 16, "num_warps": 4, "num_stages": 3}),
)


def fp8_dtype(arch: str) -> torch.dtype:
    """The eight-bit float that the matrix units of ``arch`` multiply: FNUZ on gfx942, OCP elsewhere."""
    return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn


def quantize_groups_torch(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale = max(|x|, 1e-10) / largest`` over each group of 128 columns, ``q = x / scale`` rounded to ``dtype``.

    x [N, K] float with K a multiple of 128, dtype an 8-bit float -> q [N, K] dtype, scale [N, K / 128] float32.
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


def block_fp8_linear_torch(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """``x w^T`` with x quantised by groups to w's dtype and both scaled back, summed in float32.

    x [N, K] float, w [R, K] 8-bit, w_scale [ceil(R / 128), K / 128] float32 -> [N, R] in x's dtype. DeepSeek-V3 report,
    section 3.3.2 (fine-grained quantisation).
    """
    return scaled_product(*quantize_groups_torch(x, w.dtype), w, w_scale).to(x.dtype)


def with_scales(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows x as they are if their ``scale`` is given, else quantised to ``dtype``."""
    return quantize_groups_torch(x, dtype) if scale is None else (x, scale)


def scaled_product(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The product of quantised rows q [N, K] with ``w``, both scaled back -> [N, R] float32."""
    rows = q.float() * scale.repeat_interleave(GROUP, 1)
    return rows @ dequantize_blocks(w, w_scale).t()


def quantize_groups_triton(x: Tensor, dtype: torch.dtype, padded_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """``padded_rows``: make q and scale that long, the rest not written, and scale contiguous by columns."""
    from sglang.kernels.ops.quant.group_fp8_triton import quantize_groups_kernel

    (rows, columns), length = x.shape, padded_rows or x.shape[0]
    q = torch.empty(length, columns, dtype=dtype, device=x.device)
    if padded_rows is None:
        scale = torch.empty(length, columns // GROUP, dtype=torch.float32, device=x.device)
    else:
        scale = torch.empty(columns // GROUP, length, dtype=torch.float32, device=x.device).t()
    groups = rows * (columns // GROUP)
    if groups:
        block = 1 if groups < 1024 else 8
        quantize_groups_kernel[(cdiv(groups, block),)](
            x, q, scale, groups, columns // GROUP, x.stride(0), scale.stride(0), scale.stride(1),
            LARGEST=torch.finfo(dtype).max, BLOCK=block, num_warps=1 if block == 1 else 4,
        )  # fmt: skip
    return q, scale


def block_product(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, tile: dict[str, int] | None = None
) -> Tensor:
    """The product of quantised rows with w, one launch -> [N, R] in ``dtype``; ``tile`` None takes the table's."""
    from sglang.kernels.ops.quant.group_fp8_triton import block_fp8_linear_kernel

    (rows, k_dim), width = q.shape, w.shape[0]
    out = torch.empty(rows, width, dtype=dtype, device=q.device)
    if tile is None:
        tile = next(tile for limit, tile in LINEAR_TILES if limit is None or rows <= limit)
    row_tiles, tiles = cdiv(rows, tile["BLOCK_M"]), cdiv(width, tile["BLOCK_N"])
    block_fp8_linear_kernel[(row_tiles * tiles,)](
        q, scale, w, w_scale, out, rows, width, k_dim, row_tiles, tiles, **tile
    )
    return out


def block_fp8_linear_triton(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(0, w.shape[0])
    return block_product(*quantize_groups_triton(x, w.dtype), w, w_scale, x.dtype)


def block_fp8_linear_cublas(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """cuBLAS' product with scales of 1x128 and 128x128 blocks; rows are padded to what it takes."""
    from torch.nn.functional import ScalingType, scaled_mm

    rows = x.shape[0]
    q, scale = quantize_groups_triton(x, w.dtype, cdiv(rows, LIBRARY_ROWS) * LIBRARY_ROWS)
    out = scaled_mm(
        q, w.t(), scale, ScalingType.BlockWise1x128, w_scale.t(), ScalingType.BlockWise128x128, output_dtype=x.dtype
    )
    return out[:rows]


def _accepts_library(x: Tensor, w: Tensor, w_scale: Tensor) -> bool:
    # A row of weight scales must start at 16 bytes.
    aligned = w.shape[0] % 16 == 0 and w_scale.shape[1] % 4 == 0
    many = x.shape[0] > LIBRARY_MIN_ROWS and x.dtype == torch.bfloat16
    return many and aligned and _accepts_linear(x, w, w_scale)


def _accepts_quantize(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype in FLOATS and x.stride(1) == 1 and x.shape[1] % GROUP == 0 and dtype in FP8_DTYPES


def _accepts_linear(x: Tensor, w: Tensor, w_scale: Tensor) -> bool:
    native = w.dtype == fp8_dtype(current_platform.arch)
    return native and _accepts_quantize(x, w.dtype) and w.is_contiguous() and w_scale.is_contiguous()


def _rows() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 128), (5, 384), (0, 256), (70, 256)):
        yield f"{rows}x{columns}", torch.randn(rows, columns, generator=generator)
    ugly = torch.randn(4, 256, generator=generator)
    ugly[0], ugly[1, :128], ugly[2, 7] = 0.0, 1e-20, 3e4
    yield "zero-tiny-outlier", ugly


def _quantize_cases() -> Iterator[Case]:
    for name, x in _rows():
        yield Case(name, (x, torch.float8_e4m3fn))


def random_blocks(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quantised matrix [rows, columns] of entries near N(0, 1 / columns), and the scales of its blocks."""
    w = torch.randn(rows, columns, generator=generator).mul(16).to(torch.float8_e4m3fn)
    scale = torch.rand(cdiv(rows, GROUP), cdiv(columns, GROUP), generator=generator) + 0.5
    return w, scale * columns**-0.5 / 16


def _linear_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for name, x in _rows():
        yield Case(name, (x, *random_blocks(200, x.shape[1], generator)))


quantize_groups = Op(
    "quant.quantize_groups",
    triton_impl(quantize_groups_triton, _accepts_quantize),
    Impl("torch", quantize_groups_torch),
    cases=_quantize_cases,
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
    cases=_linear_cases,
)
