"""Rotary position embedding of the last columns of heads, forth or back."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl, warps_for
from sglang.kernels.spec import Impl, Op

# Numbers of heads that a program holds.
NUMBERS_PER_PROGRAM = 4096


def rotary_tail_torch(x: Tensor, positions: Tensor, cos_sin_cache: Tensor, inverse: bool = False) -> Tensor:
    """Turn the last R columns of each head by its position's angles, or by minus them; the others pass unchanged.

    x [N, H, D], positions [N] int64 in [0, P), cos_sin_cache [P, R] float32 (R/2 cosines, then R/2 sines) -> a new
    [N, H, D] in x's dtype. Pair i is columns 2i and 2i + 1 of the R; the product is in float32. Su et al. 2021, eq. 34.
    """
    width = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    if inverse:
        sin = -sin
    even, odd = x[..., -width:].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :-width], turned.to(x.dtype)), dim=-1)


def rotary_tail_triton(x: Tensor, positions: Tensor, cos_sin_cache: Tensor, inverse: bool = False) -> Tensor:
    from sglang.kernels.ops.rope.rotary_tail_triton import rotary_tail_kernel

    num_rows, heads, dim = x.shape
    out = torch.empty(num_rows, heads, dim, dtype=x.dtype, device=x.device)
    if x.numel():
        block = next_power_of_2(dim)
        of_program = max(1, min(NUMBERS_PER_PROGRAM // block, next_power_of_2(heads)))
        rotary_tail_kernel[(num_rows, cdiv(heads, of_program))](
            x, positions, cos_sin_cache, out, heads, x.stride(0), x.stride(1), cos_sin_cache.stride(0),
            DIM=dim, ROTARY=cos_sin_cache.shape[1], INVERSE=inverse, BLOCK=block, HEADS=of_program,
            num_warps=warps_for(of_program * block),
        )  # fmt: skip
    return out


def _accepts(x: Tensor, positions: Tensor, cos_sin_cache: Tensor, inverse: bool = False) -> bool:
    dense = x.stride(2) == cos_sin_cache.stride(1) == 1
    return dense and x.dtype in FLOATS and x.shape[2] % 2 == 0 and x.shape[2] <= NUMBERS_PER_PROGRAM


rotary_tail = Op("rope.rotary_tail", triton_impl(rotary_tail_triton, _accepts), Impl("torch", rotary_tail_torch))
