"""Activation, rotation and greedy choice of the served models, decode and prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.amd.shapes import WIDE_BUFFER_LOAD, ServingShape, shape_only


def _rotary(tokens: int, heads: int, dim: int, kv: torch.Tensor, rotary_dim: int, is_neox: bool) -> tuple:
    positions = shape_only(tokens, dtype=torch.int64)
    cache = shape_only(4096, rotary_dim, dtype=torch.float32)
    q = shape_only(tokens, heads, 192)[..., 128:] if dim == 64 else shape_only(tokens, heads, dim)
    return positions, q, kv, cache, is_neox


def shapes() -> Iterator[ServingShape]:
    for name, width in (("v2lite-shared", 2816), ("v3-dense", 18432), ("qwen35-shared", 512)):
        yield ServingShape(
            "activation.silu_and_mul",
            f"{name}-t128",
            lambda w=width: (shape_only(128, 2 * w),),
            {"silu_and_mul_kernel": (WIDE_BUFFER_LOAD,)} if width >= 2048 else {},
        )
    for tokens in (1, 128):
        yield ServingShape(
            "rope.rotary",
            f"v2lite-t{tokens}",
            lambda n=tokens: _rotary(n, 16, 64, shape_only(n, 576)[:, 512:].unsqueeze(1), 64, False),
        )
    yield ServingShape(
        "rope.rotary", "v3-t128", lambda: _rotary(128, 128, 64, shape_only(128, 576)[:, 512:].unsqueeze(1), 64, False)
    )
    yield ServingShape("rope.rotary", "qwen35-t128", lambda: _rotary(128, 16, 256, shape_only(128, 2, 256), 64, True))
    for rows, vocab in ((1, 102400), (128, 129280), (128, 248320), (512, 129280)):
        yield ServingShape(
            "sampling.greedy",
            f"{rows}x{vocab}",
            lambda r=rows, v=vocab: (shape_only(r, v, dtype=torch.float32),),
            {"greedy_kernel": (WIDE_BUFFER_LOAD,)},
        )
