"""A product of rows with a dense matrix of their own dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import cdiv, early_start, triton_impl
from sglang.kernels.spec import Impl, Op

# Outputs and columns of a program for one row (those of one token's experts, which are as many bytes per program), and
# the most elements of a matrix: a larger one keeps the library at the rate of memory.
ROW_TILE = {"BLOCK_E": 2, "BLOCK_K": 1024, "num_warps": 2}
ROW_MAX_ELEMENTS = 1 << 26


def dense_linear_torch(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x w^T + bias``: x [N, K], w [R, K] and bias [R] of one dtype -> [N, R] in it."""
    return F.linear(x, w, bias)


def dense_linear_row(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """One row by the kernel of a router with few tokens: bytes alone count, so no matrix unit; sums in float32."""
    from sglang.kernels.ops.moe.router_logits_triton import few_tokens_logits_kernel

    assert bias is None
    width, columns = w.shape
    out = torch.empty(1, width, dtype=x.dtype, device=x.device)
    few_tokens_logits_kernel[(cdiv(width, ROW_TILE["BLOCK_E"]), 1)](
        x, w, out, 1, width, columns, x.stride(0), w.stride(0), BLOCK_T=1, **ROW_TILE, **early_start()
    )
    return out


def _is_row(x: Tensor, w: Tensor, bias: Tensor | None = None) -> bool:
    one = x.ndim == 2 and x.shape[0] == 1 and bias is None and 0 < w.numel() <= ROW_MAX_ELEMENTS
    return one and x.dtype == w.dtype in (torch.bfloat16, torch.float16) and x.stride(1) == w.stride(1) == 1


dense_linear = Op(
    "linear.dense",
    triton_impl(dense_linear_row, _is_row, "triton_row", kinds={"cuda"}, archs=("sm_90",)),
    # The library serves what is left, by choice: nothing falls back.
    Impl("blas", dense_linear_torch, kinds={"cuda", "hip"}, needs_device=True),
    Impl("torch", dense_linear_torch),
)
