"""Routed experts' sum plus the shared expert's output under its own sigmoid gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import FLOATS, early_start, next_power_of_2, triton_impl, warps_for
from sglang.kernels.spec import Impl, Op

# The widest row that one program holds.
MAX_TRITON_DIM = 16384


def add_gated_shared_torch(routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    """``routed + shared * sigmoid(gate_weight x)``.

    routed, shared and x [N, H], gate_weight [1, H], all of one dtype -> new [N, H]. The gate's product is summed in
    float32; it, its sigmoid and the gated row are each rounded to the dtype before the next step.
    """
    return routed + shared * F.linear(x, gate_weight).sigmoid()


def add_gated_shared_triton(routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    from sglang.kernels.ops.moe.add_gated_shared_triton import add_gated_shared_kernel

    tokens, hidden = x.shape
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens:
        block = next_power_of_2(hidden)
        add_gated_shared_kernel[(tokens,)](
            routed, shared, x, gate_weight, out, hidden, routed.stride(0), shared.stride(0), x.stride(0),
            BLOCK=block, num_warps=warps_for(block), **early_start(),
        )  # fmt: skip
    return out


def _accepts(routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> bool:
    dense = all(tensor.stride(1) == 1 for tensor in (routed, shared, x, gate_weight))
    same = routed.dtype == shared.dtype == x.dtype == gate_weight.dtype
    return dense and same and x.dtype in FLOATS and x.shape[1] <= MAX_TRITON_DIM


add_gated_shared = Op(
    "moe.add_gated_shared", triton_impl(add_gated_shared_triton, _accepts), Impl("torch", add_gated_shared_torch)
)
