"""FAKE of AITER's two Triton kernels of hyper-connections: the matrix in the rows' dtype, scratch poisoned."""

from __future__ import annotations

from typing import Any

import torch

from aiter.errors import require
from aiter.ops.mhc import way_in, way_out
from aiter.ops.triton.utils.mhc_config_utils import get_mhc_config


def mhc_post_pre(
    layer_input: torch.Tensor,
    residual_in: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    phi: torch.Tensor,
    alphas: torch.Tensor,
    bias: torch.Tensor,
    n: int,
    eps: float = 1e-6,
    hc_pre_eps: float = 1e-6,
    hc_post_mult_value: float = 2.0,
    sinkhorn_iters: int = 20,
    asymmetric_exp_domain: bool = False,
    hc_sinkhorn_eps: float = 1e-6,
    residual_out: torch.Tensor | None = None,
    h_post: torch.Tensor | None = None,
    h_res: torch.Tensor | None = None,
    layer_input_out: torch.Tensor | None = None,
    acc_partial: torch.Tensor | None = None,
    acc_sq_partial: torch.Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """post [M, n, 1], comb [M, n, n], the row [M, C] and the new streams [M, n, C]."""
    rows, width = layer_input.shape
    assert residual_in.shape == (rows, n, width), "shape mismatch"
    assert phi.shape == (n * width, 2 * n + n * n), f"phi mismatch: expected ({n * width}, {2 * n + n * n})"
    assert post_mix.shape in ((rows, n), (rows, n, 1)) and comb_mix.shape == (rows, n, n)
    require(sinkhorn_iters > 0 and asymmetric_exp_domain, "another function than the model's: log domain, without eps")
    block = dict(get_mhc_config("MHC_FUSED", rows, width, mode="sinkhorn")[0] if config is None else config)["BLOCK_K"]
    assert block % n == 0
    splits = -(-width // (min(block, _power_of_2(n * width)) // n))
    wanted = {"acc_partial": (splits, rows, 2 * n + n * n), "acc_sq_partial": (splits, rows)}
    for name, scratch in (("acc_partial", acc_partial), ("acc_sq_partial", acc_sq_partial)):
        if scratch is not None:
            assert scratch.shape == wanted[name] and scratch.dtype == torch.float32, f"{name} shape mismatch"
            scratch.fill_(torch.nan)  # nothing may be read of it after
    dtype = layer_input.dtype
    streams = way_out(layer_input, residual_in, post_mix, comb_mix, torch.float32)
    flat = streams.flatten(1)
    # The statistics are of the streams before they are rounded, the products of what both are rounded to.
    inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    products = flat.to(dtype).float() @ phi.to(dtype).float() * inverse
    streams = streams.to(dtype)
    found = way_in(products, streams, alphas, bias, (hc_pre_eps, hc_sinkhorn_eps), hc_post_mult_value, sinkhorn_iters)
    post, comb, row = found
    h_post = _written(h_post, post if h_post is not None and h_post.ndim == 2 else post.unsqueeze(-1), dtype)
    outputs = (h_post.view(rows, n, 1), _written(h_res, comb, dtype))
    return (*outputs, _written(layer_input_out, row, dtype), _written(residual_out, streams, dtype))


def _written(out: torch.Tensor | None, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if out is None:
        return value.to(dtype)
    assert out.shape == value.shape
    return out.copy_(value)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
