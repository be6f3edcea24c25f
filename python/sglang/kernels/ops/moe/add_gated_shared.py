"""Routed experts' sum plus the shared expert's output under its own sigmoid gate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import FLOATS, early_start, next_power_of_2, triton_impl, warps_for
from sglang.kernels.spec import Case, Impl, Op

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


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for tokens, hidden in ((1, 8), (7, 33), (0, 16), (5, 300)):
        routed, shared, x = torch.randn(3, tokens, 2 * hidden, generator=generator)[..., :hidden].unbind(0)
        yield Case(f"{tokens}x{hidden}", (routed, shared, x, torch.randn(1, hidden, generator=generator) / hidden**0.5))
    signs = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    yield Case("saturated", (signs, 3 * signs, 200 * signs, torch.ones(1, 2)))
    yield Case("nan-row", (signs, signs, torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), torch.ones(1, 2)))


add_gated_shared = Op(
    "moe.add_gated_shared",
    triton_impl(add_gated_shared_triton, _accepts),
    Impl("torch", add_gated_shared_torch),
    cases=_cases,
)
