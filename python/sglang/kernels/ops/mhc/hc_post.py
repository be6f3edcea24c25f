"""The way out of a sub-block of hyper-connections: its row spread over the streams, which are mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.mhc.launchers import fits_way_out, mix_streams
from sglang.kernels.spec import Impl, Op


def hc_post_torch(row: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``x'[k] = post[k] row + sum_j comb[j, k] x[j]``: the sum is over the first index, the source.

    row [N, D], x [N, n, D] of one dtype, post [N, n] and comb [N, n, n] float32 -> a new [N, n, D] in x's dtype,
    rounded once.
    """
    mixed = torch.bmm(comb.transpose(1, 2), x.float())
    return torch.addcmul(mixed, post.unsqueeze(-1), row.float().unsqueeze(1)).to(x.dtype)


def hc_post_triton(row: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return mix_streams(x, row, post, comb)


hc_post = Op("mhc.hc_post", triton_impl(hc_post_triton, fits_way_out), Impl("torch", hc_post_torch))
