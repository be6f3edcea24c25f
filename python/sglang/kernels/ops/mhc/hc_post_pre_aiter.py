"""AITER's two ways to leave and enter a sub-block at once: a HIP kernel, and two Triton kernels."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sglang.kernels.launch import aiter_impl, cdiv, next_power_of_2
from sglang.kernels.spec import Impl

logger = logging.getLogger(__name__)

# Before this release the kernel of the statistics raced.
MIN_VERSION = (0, 1, 14)
HIP_MODULE = "aiter.ops.mhc"
TRITON_MODULE = "aiter.ops.triton.fusions.mhc"
# Of the HIP kernel: columns of a block, of which a row has two at least, and the widths whose norm it folds.
HIP_BLOCK = 256
HIP_NORMED_WIDTHS = (1280, 2560, 4096, 7168)
# The most rows for which the Triton kernels were chosen. sglang PR 26383.
MAX_TRITON_ROWS = 64


def hc_post_pre_hip(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:  # fmt: skip
    """``mhc.hc_post_pre``; the norm is folded only where its gain is of the rows' dtype, as which AITER reads it."""
    from aiter.ops.mhc import mhc_fused_post_pre

    folds = norm_weight is not None and norm_weight.dtype == x.dtype and x.shape[2] in HIP_NORMED_WIDTHS
    new_post, new_comb, out, streams = mhc_fused_post_pre(
        row, x, post, comb, fn, hc_scale=scale, hc_base=base, rms_eps=rms_eps, hc_pre_eps=hc_eps,
        hc_sinkhorn_eps=hc_eps, hc_post_mult_value=2.0, sinkhorn_repeat=iterations,
        norm_weight=norm_weight if folds else None, norm_eps=norm_eps,
    )  # fmt: skip
    return streams, out, new_post.view(post.shape), new_comb, folds


def fits_hip(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> bool:  # fmt: skip
    """Four dense streams in 16 bits, of a width that the kernel reads in whole blocks."""
    whole = x.shape[2] % HIP_BLOCK == 0 and x.shape[2] >= 2 * HIP_BLOCK and fn.is_contiguous()
    dense = x.is_contiguous() and row.is_contiguous()
    return whole and dense and _fits(row, x, post, comb, fn, base, scale, iterations)


def hc_post_pre_aiter_triton(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:  # fmt: skip
    """``mhc.hc_post_pre`` with fn rounded to the rows' dtype; the norm is left to the caller."""
    from aiter.ops.triton.fusions.mhc import mhc_post_pre

    num_rows, n, width = x.shape
    config = mhc_config(num_rows, width)
    assert config is not None  # ``fits_triton`` has looked
    products, squares = partial_sums(num_rows, n, width, config, x.device)
    new_post, new_comb = torch.empty_like(post), torch.empty_like(comb)
    _, _, out, streams = mhc_post_pre(
        row, x, post, comb, fn.t(), alphas=scale, bias=base, n=n, eps=rms_eps, hc_pre_eps=hc_eps,
        hc_post_mult_value=2.0, sinkhorn_iters=iterations, asymmetric_exp_domain=True, hc_sinkhorn_eps=hc_eps,
        h_post=new_post, h_res=new_comb, acc_partial=products, acc_sq_partial=squares, config=dict(config),
    )  # fmt: skip
    return streams, out, new_post, new_comb, False


def fits_triton(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor | None = None, norm_eps: float = 0.0,
) -> bool:  # fmt: skip
    """Up to 64 rows in 16 bits, of a shape for which AITER has a configuration."""
    return (
        0 < x.shape[0] <= MAX_TRITON_ROWS
        and _fits(row, x, post, comb, fn, base, scale, iterations)
        and mhc_config(x.shape[0], x.shape[2]) is not None
    )


def _fits(
    row: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int
) -> bool:
    wide = (post, comb, base, scale)
    floats = fn.dtype == torch.float32 and all(part.dtype == torch.float32 and part.is_contiguous() for part in wide)
    half = x.dtype in (torch.bfloat16, torch.float16) and row.dtype == x.dtype and row.stride(1) == 1
    return floats and half and x.shape[0] > 0 and x.shape[1] == 4 and x.stride(2) == 1 and iterations > 0


@lru_cache(maxsize=1024)
def mhc_config(num_rows: int, width: int) -> dict[str, Any] | None:
    """AITER's configuration for the shape, or None where it has none, said once per shape."""
    from aiter.ops.triton.utils.mhc_config_utils import get_mhc_config

    try:
        config, _ = get_mhc_config("MHC_FUSED", num_rows, width, mode="sinkhorn")
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        logger.warning("AITER has no mHC configuration for %d x %d (%s): it is not used", num_rows, width, error)
        return None
    return dict(config)


def partial_sums(
    num_rows: int, n: int, width: int, config: dict[str, Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The kernels' scratch: products [S, N, (2 + n) n] and squares [S, N] float32, for this call alone."""
    block = min(int(config.get("BLOCK_K", 512)), next_power_of_2(n * width))
    splits = cdiv(width, max(1, block // n))
    products = torch.empty(splits, num_rows, (2 + n) * n, dtype=torch.float32, device=device)
    return products, torch.empty(splits, num_rows, dtype=torch.float32, device=device)


def aiter_impls() -> tuple[Impl, Impl]:
    """AITER's lines of the op table: where SGLANG_USE_AITER asks for it, on the architecture of sglang PR 26383."""
    limits: dict[str, Any] = {"archs": ("gfx95",), "min_version": MIN_VERSION}
    return (
        aiter_impl(hc_post_pre_hip, fits_hip, package=HIP_MODULE, **limits),
        aiter_impl(hc_post_pre_aiter_triton, fits_triton, "aiter_triton", TRITON_MODULE, **limits),
    )
