"""The product of a router whose logits are float32: 16-bit rows and weights as they are, sums in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, triton_impl
from sglang.kernels.spec import Impl, Op

# Tokens up to which programs share out the experts and do not use the matrix unit (by reasoning, not measured).
FEW_TOKENS = 16


def router_logits_torch(x: Tensor, weight: Tensor) -> Tensor:
    """``float32(x) float32(weight)^T``: x [N, H], weight [E, H] of one dtype -> [N, E] float32."""
    return F.linear(x.float(), weight.float())


def router_logits_mm(x: Tensor, weight: Tensor) -> Tensor:
    """One library product that reads 16 bits and writes float32."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def router_logits_triton(x: Tensor, weight: Tensor) -> Tensor:
    from sglang.kernels.ops.moe.router_logits_triton import few_tokens_logits_kernel, many_tokens_logits_kernel

    (tokens, hidden), experts = x.shape, weight.shape[0]
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    operands = (x, weight, out, tokens, experts, hidden, x.stride(0), weight.stride(0))
    if tokens > FEW_TOKENS:
        block_t, block_e = 16 if tokens <= 512 else 64, 32
        tiles = cdiv(experts, block_e)
        many_tokens_logits_kernel[(cdiv(tokens, block_t) * tiles,)](
            *operands, tiles, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=64, num_warps=4
        )
    elif tokens:
        # With many experts a program computes several, so that rows are not read once for each.
        one = tokens == 1
        block_t, block_e = (1, 1 if experts <= 128 else 2) if one else (4, 1 if experts <= 64 else 4)
        block_k = min(next_power_of_2(hidden), 2048 if one else 1024)
        few_tokens_logits_kernel[(cdiv(experts, block_e), cdiv(tokens, block_t))](
            *operands, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k,
            num_warps=8 if block_t * block_e * block_k >= 8192 else 4, **early_start(),
        )  # fmt: skip
    return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in FLOATS and x.stride(1) == weight.stride(1) == 1


def _accepts_mm(x: Tensor, weight: Tensor) -> bool:
    return _fits(x, weight) and x.dtype != torch.float32 and x.shape[0] > FEW_TOKENS


def _accepts(x: Tensor, weight: Tensor) -> bool:
    # A large product of float32 is one launch of the library already.
    return _fits(x, weight) and (x.dtype != torch.float32 or x.shape[0] <= FEW_TOKENS)


router_logits = Op(
    "moe.router_logits",
    Impl("mm", router_logits_mm, kinds={"cuda"}, needs_device=True, accepts=_accepts_mm),
    triton_impl(router_logits_triton, _accepts),
    Impl("torch", router_logits_torch),
)
