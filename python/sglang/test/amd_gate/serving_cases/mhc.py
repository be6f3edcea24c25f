"""Arguments without contents at which served models call the ops of ``kernels/ops/mhc``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.mhc.hc_head import hc_head
from sglang.kernels.ops.mhc.hc_post import hc_post
from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre
from sglang.kernels.ops.mhc.hc_pre import hc_pre
from sglang.kernels.spec import Op
from sglang.test.op_cases import Case

# Hidden sizes of served models of four streams, and one that is no multiple of 256.
SERVING_WIDTHS = {"v4flash": 4096, "v4pro": 7168, "odd": 2880}


def hc_head_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents."""
    for name, x in serving_streams(device):
        yield hc_head, Case(name, (x, *serving_parameters(x, x.shape[1], 1), 1e-6, 1e-6))


def serving_way_out(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of ``hc_post`` for streams x, without contents."""
    n = x.shape[1]
    post, comb = (torch.empty(x.shape[0], *shape, dtype=torch.float32, device=x.device) for shape in ((n,), (n, n)))
    return torch.empty_like(x[:, 0]), x, post, comb


def hc_post_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents."""
    for name, x in serving_streams(device):
        yield hc_post, Case(name, serving_way_out(x))


def hc_post_pre_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents."""
    for name, x in serving_streams(device):
        gain = torch.empty(x.shape[2], dtype=torch.float32, device=device)
        args = (*serving_way_out(x), *serving_parameters(x, 24, 3), 1e-6, 1e-6, 20, gain, 1e-6)
        yield hc_post_pre, Case(name, args)


def serving_streams(device: str) -> Iterator[tuple[str, Tensor]]:
    """Streams of served widths in bf16, without contents, for one row, a decode batch and a prompt chunk."""
    for name, width in SERVING_WIDTHS.items():
        for tokens in (1, 64, 4096):
            yield f"{name} t{tokens}", torch.empty(tokens, 4, width, dtype=torch.bfloat16, device=device)


def serving_parameters(x: Tensor, rows: int, scales: int) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale for streams x, without contents."""
    shapes = ((rows, x.shape[1] * x.shape[2]), (rows,), (scales,))
    fn, base, scale = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    return fn, base, scale


def hc_pre_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents."""
    for name, x in serving_streams(device):
        yield hc_pre, Case(name, (x, *serving_parameters(x, 24, 3), 1e-6, 1e-6, 20))


CASES = (
    hc_head_cases,
    hc_post_cases,
    hc_post_pre_cases,
    hc_pre_cases,
)
