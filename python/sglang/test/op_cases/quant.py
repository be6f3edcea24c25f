"""Cases of the ops ``quant.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv
from sglang.kernels.ops.quant.group_fp8 import GROUP, empty_quantized, quantize_groups_torch
from sglang.test.op_cases import Case


def _rows() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 128), (5, 384), (0, 256), (70, 256)):
        yield f"{rows}x{columns}", torch.randn(rows, columns, generator=generator)
    ugly = torch.randn(4, 256, generator=generator)
    ugly[0], ugly[1, :128], ugly[2, 7], ugly[3, 130] = 0.0, 1e-20, 3e4, float("nan")
    yield "zero-tiny-outlier-nan", ugly


def quantize_groups() -> Iterator[Case]:
    for name, x in _rows():
        yield Case(name, (x, torch.float8_e4m3fn))


def random_blocks(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quantised matrix [rows, columns] of entries near N(0, 1 / columns), and the scales of its blocks."""
    w = torch.randn(rows, columns, generator=generator).mul(16).to(torch.float8_e4m3fn)
    scale = torch.rand(cdiv(rows, GROUP), cdiv(columns, GROUP), generator=generator) + 0.5
    return w, scale * columns**-0.5 / 16


def block_fp8_linear() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for name, x in _rows():
        blocks = random_blocks(200, x.shape[1], generator)
        yield Case(name, (x, *blocks))
        q, scale = empty_quantized(x.shape[0], x.shape[1], blocks[0].dtype, x.device)
        for made, wanted in zip((q, scale), quantize_groups_torch(x, q.dtype), strict=True):
            made.copy_(wanted)
        yield Case(f"{name}-quantised", (q, *blocks, scale, torch.float32))
    for rows, columns in ((1, 1152), (1, 2048), (3, 2176), (16, 2048), (27, 2176)):
        x = torch.randn(rows, columns, generator=generator)
        yield Case(f"{rows}x{columns}", (x, *random_blocks(136, columns, generator)))
