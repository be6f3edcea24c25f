"""FAKE of the HIP kernels of hyper-connections: float32 coefficients, streams rounded once."""

from __future__ import annotations

import torch

from aiter.errors import require

_NORMED_WIDTHS = (1280, 2560, 4096, 7168)


def way_out(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``out[j] = post[j] x + sum_h comb[h, j] residual[h]`` in float32, rounded to ``dtype`` (not the vendor's)."""
    mixed = torch.einsum("mhj,mhc->mjc", comb, residual.float())
    return (mixed + post.reshape(post.shape[0], -1, 1) * x.float().unsqueeze(1)).to(dtype)


def way_in(
    products: torch.Tensor, streams: torch.Tensor, scale: torch.Tensor, base: torch.Tensor,
    eps: tuple[float, float], post_mult: float, iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """post [M, n], comb [M, n, n] and the row [M, C] of normed products [M, 2n + n^2] (not the vendor's).

    eps: of the row's weights, and of the balancing, whose first step is over rows by softmax.
    """
    n = streams.shape[1]
    pre, post, comb = products.split((n, n, n * n), dim=-1)
    weights = torch.sigmoid(pre * scale[0] + base[:n]) + eps[0]
    p = (comb * scale[2] + base[2 * n :]).view(-1, n, n).softmax(-1) + eps[1]
    p = p / (p.sum(1, keepdim=True) + eps[1])
    for _ in range(iterations - 1):
        p = p / (p.sum(2, keepdim=True) + eps[1])
        p = p / (p.sum(1, keepdim=True) + eps[1])
    row = torch.einsum("mn,mnc->mc", weights, streams.float()).to(streams.dtype)
    return post_mult * torch.sigmoid(post * scale[1] + base[n : 2 * n]), p, row


def mhc_fused_post_pre(
    layer_input: torch.Tensor,
    residual_in: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float = 1e-6,
    hc_pre_eps: float = 1e-6,
    hc_sinkhorn_eps: float = 1e-6,
    hc_post_mult_value: float = 1.0,
    sinkhorn_repeat: int = 20,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    force_fused: bool = False,
    is_fn_pack_bf16: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """post [M, n, 1], comb [M, n, n] float32, the row [M, C], normed with a weight, and the new streams [M, n, C]."""
    rows, n, width = residual_in.shape
    assert n == 4, "hc_mult only supports 4"
    assert width % 256 == 0, "hidden_size must be divisible by 256"
    assert width >= 512, "hidden_size must be >= residual_block * 2 stages prefetch"
    assert residual_in.stride(0) == fn.stride(0) == n * width, "residual and fn must be dense"
    assert layer_input.shape == (rows, width) and fn.shape == (2 * n + n * n, n * width), "shape mismatch"
    require(not is_fn_pack_bf16, "the fake knows no packed fn")
    require(rows > 0, "a grid of no blocks")
    require(layer_input.dtype in (torch.bfloat16, torch.float16) and residual_in.is_contiguous(), "rows of 16 bits")
    require(residual_in.dtype == layer_input.dtype, "streams are read in the dtype of the row")
    for part in (post_layer_mix, comb_res_mix, fn, hc_scale, hc_base):
        require(part.dtype == torch.float32 and part.is_contiguous(), "coefficients are read as dense float32")
    streams = way_out(layer_input, residual_in, post_layer_mix, comb_res_mix, layer_input.dtype)
    flat = streams.flatten(1).float()
    products = flat @ fn.t() * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    eps = hc_pre_eps, hc_sinkhorn_eps
    post, comb, row = way_in(products, streams, hc_scale, hc_base, eps, hc_post_mult_value, sinkhorn_repeat)
    if norm_weight is not None:
        assert width in _NORMED_WIDTHS, "hidden_size only supports 7168, 4096, 2560 and 1280"
        require(norm_weight.dtype == row.dtype, "the gain is read in the dtype of the row, whatever it is")
        wide = row.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        row = (wide * scale * norm_weight.float()).to(row.dtype)
    return post.unsqueeze(-1), comb, row, streams
