"""Rotary position embedding of queries and keys from a table of cosines and sines."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl, warps_for
from sglang.kernels.spec import Impl, Op


def rotary_torch(
    positions: Tensor, q: Tensor, k: Tensor, cos_sin_cache: Tensor, is_neox: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of each head by its position's angles; the other dimensions pass unchanged.

    positions [N] int64 in [0, P), q [N, Hq, D], k [N, Hk, D], cos_sin_cache [P, R] float32 (R/2 cosines, then R/2
    sines) -> new (q, k) in their dtypes. Pair i is (x_i, x_{i+R/2}) when ``is_neox``, else (x_{2i}, x_{2i+1}), and is
    written back where it came from. Su et al. 2021, eq. 34.
    """
    heads = q.shape[1]
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    both = torch.cat((q, k), dim=1)
    rotary_dim = cos_sin_cache.shape[1]
    x = both[..., :rotary_dim].float()
    if is_neox:
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        rotated = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    rotated = rotated.to(q.dtype)
    if rotary_dim < both.shape[-1]:
        rotated = torch.cat((rotated, both[..., rotary_dim:]), dim=-1)
    return rotated[:, :heads], rotated[:, heads:]


def rotary_triton(
    positions: Tensor, q: Tensor, k: Tensor, cos_sin_cache: Tensor, is_neox: bool
) -> tuple[Tensor, Tensor]:
    from sglang.kernels.ops.rope.rotary_triton import rotary_kernel

    tokens, q_heads, dim = q.shape
    k_heads, half = k.shape[1], cos_sin_cache.shape[1] // 2
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if tokens:
        block = next_power_of_2(half)
        rest = next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
        heads = min(next_power_of_2(q_heads + k_heads), max(1, next_power_of_2(2048 // (2 * block + rest) + 1) // 2))
        blocks = cdiv(q_heads + k_heads, heads)
        rotary_kernel[(tokens * blocks,)](
            positions, q, k, cos_sin_cache, q_out, k_out, q_heads, k_heads, dim, blocks,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos_sin_cache.stride(0),
            HALF=half, IS_NEOX=is_neox, HEADS=heads, BLOCK=block, REST=rest,
            num_warps=warps_for(heads * (2 * block + rest)),
        )  # fmt: skip
    return q_out, k_out


def _accepts(positions: Tensor, q: Tensor, k: Tensor, cos_sin_cache: Tensor, is_neox: bool) -> bool:
    dense = q.stride(-1) == k.stride(-1) == cos_sin_cache.stride(-1) == 1 and positions.is_contiguous()
    same = q.dtype == k.dtype and q.shape[-1] == k.shape[-1]
    return dense and same and q.dtype in FLOATS and cos_sin_cache.dtype in FLOATS


rotary = Op("rope.rotary", triton_impl(rotary_triton, _accepts), Impl("torch", rotary_torch))
