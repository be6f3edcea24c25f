"""One query per request over the latent cache, and the product that takes its context out of the latent space."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.decode_attention import decode_attention_torch, fits_table
from sglang.kernels.ops.attention.launchers import launch_parts, merge_parts, project_parts, projects
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.ops.quant import group_fp8
from sglang.kernels.spec import Impl, Op


def mla_decode_project_torch(
    q: Tensor, latent_cache: Tensor, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, w_vc: Tensor,
    scale: float, dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``attention.decode_attention`` over latent_cache [S, R+P], and each head's context times its w_vc [H, R, v].

    -> [B, H*v] in q's dtype. With an 8-bit ``dtype``, these rows as ``quant.quantize_groups`` gives them instead; H*v
    is a multiple of 128 then.
    """
    rows = (req_to_token, req_pool_indices, seq_lens)
    out = take_out(decode_attention_torch(q, latent_cache.unsqueeze(1), None, *rows, scale, w_vc.shape[1]), w_vc)
    return out if dtype is None else group_fp8.quantize_groups_torch(out, dtype)


def take_out(context: Tensor, w_vc: Tensor) -> Tensor:
    """context [N, H, R] times w_vc [H, R, v] -> [N, H*v]."""
    out = context.new_empty(*context.shape[:2], w_vc.shape[2])
    torch.bmm(context.transpose(0, 1), w_vc, out=out.transpose(0, 1))
    return out.flatten(1)


def mla_decode_project_triton(
    q: Tensor, latent_cache: Tensor, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, w_vc: Tensor,
    scale: float, dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    shape = RowShape.of(q.shape[2], w_vc.shape[1], value_is_key=True)
    rows = latent_cache.unsqueeze(1)
    parts, lse = launch_parts(q, rows, rows, req_to_token, req_pool_indices, seq_lens, scale, shape)
    if lse is not None and projects(parts, w_vc, dtype):
        return project_parts(parts, lse, w_vc, dtype)
    out = take_out(parts if lse is None else merge_parts(parts, lse, q.dtype), w_vc)
    return out if dtype is None else group_fp8.quantize_groups_triton(out, dtype, for_product=True)


def _accepts(
    q: Tensor, latent_cache: Tensor, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, w_vc: Tensor,
    scale: float, dtype: torch.dtype | None = None,
) -> bool:  # fmt: skip
    whole = dtype is None or (dtype in group_fp8.FP8_DTYPES and w_vc.shape[0] * w_vc.shape[2] % group_fp8.GROUP == 0)
    rows = (req_to_token, req_pool_indices, seq_lens)
    fits = fits_table(q, latent_cache.unsqueeze(1), None, *rows, scale, w_vc.shape[1])
    return whole and w_vc.dtype == q.dtype and fits


mla_decode_project = Op(
    "attention.mla_decode_project",
    triton_impl(mla_decode_project_triton, _accepts),
    Impl("torch", mla_decode_project_torch),
)
