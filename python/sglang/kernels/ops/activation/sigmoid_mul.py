"""A sigmoid gate on an output."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, rows_of, triton_impl
from sglang.kernels.spec import Impl, Op


def sigmoid_mul_torch(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate [..., D] -> new contiguous ``x * sigmoid(gate)``, the sigmoid rounded to the dtype first."""
    return (x * gate.sigmoid()).contiguous()


def sigmoid_mul_triton(x: Tensor, gate: Tensor) -> Tensor:
    from sglang.kernels.ops.activation.sigmoid_mul_triton import sigmoid_mul_kernel

    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, gate_rows = rows_of(x), rows_of(gate)
    assert x_rows is not None and gate_rows is not None
    if out.numel():
        block = next_power_of_2(width)
        rows = max(1, 1024 // block)
        sigmoid_mul_kernel[(cdiv(x_rows.num_rows, rows),)](
            x, gate, out, x_rows.num_rows, width, *x_rows[1:], *gate_rows[1:],
            ROWS=rows, BLOCK=block, num_warps=4, **early_start(),
        )  # fmt: skip
    return out


def _accepts(x: Tensor, gate: Tensor) -> bool:
    same = x.dtype == gate.dtype and x.shape == gate.shape and x.dtype in FLOATS and x.shape[-1] <= 8192
    return same and rows_of(x) is not None and rows_of(gate) is not None


sigmoid_mul = Op("activation.sigmoid_mul", triton_impl(sigmoid_mul_triton, _accepts), Impl("torch", sigmoid_mul_torch))
