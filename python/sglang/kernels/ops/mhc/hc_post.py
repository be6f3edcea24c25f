"""The way out of a sub-block of hyper-connections: its row spread over the streams, which are mixed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.mhc.hc_pre import streams
from sglang.kernels.ops.mhc.launchers import fits_way_out, mix_streams
from sglang.kernels.spec import Case, Impl, Op


def hc_post_torch(row: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``x'[k] = post[k] row + sum_j comb[j, k] x[j]``: the sum is over the first index, the source.

    row [N, D], x [N, n, D] of one dtype, post [N, n] and comb [N, n, n] float32 -> a new [N, n, D] in x's dtype,
    rounded once.
    """
    mixed = torch.bmm(comb.transpose(1, 2), x.float())
    return torch.addcmul(mixed, post.unsqueeze(-1), row.float().unsqueeze(1)).to(x.dtype)


def hc_post_triton(row: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return mix_streams(x, row, post, comb)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, x in streams(generator):
        rows, n, width = x.shape
        row = torch.randn(rows, width, generator=generator)
        post = torch.rand(rows, n, generator=generator) * 2
        yield Case(name, (row, x, post, torch.rand(rows, n, n, generator=generator)))


hc_post = Op("mhc.hc_post", triton_impl(hc_post_triton, fits_way_out), Impl("torch", hc_post_torch), cases=_cases)
