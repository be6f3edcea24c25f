"""Routers and routed experts of DeepSeek-V2-Lite, DeepSeek-V3 and a Qwen3.5-35B-like model, on every path."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.amd.shapes import MFMA_BF16, WIDE_BUFFER_LOAD, WIDE_LOAD, ServingShape, shape_only

# name -> experts, hidden, intermediate, top k
MODELS = {"v2lite": (64, 2048, 1408, 6), "qwen35": (256, 2048, 512, 8), "v3": (256, 7168, 2048, 8)}
TOKENS = (1, 8, 128, 1024, 8192)


def _experts(name: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    experts, hidden, width, top_k = MODELS[name]
    return (
        shape_only(tokens, hidden, dtype=dtype),
        shape_only(experts, 2 * width, hidden, dtype=dtype),
        shape_only(experts, hidden, width, dtype=dtype),
        shape_only(tokens, top_k, dtype=torch.float32),
        shape_only(tokens, top_k, dtype=torch.int32),
    )


def _routers() -> Iterator[ServingShape]:
    yield ServingShape(
        "moe.topk_plain", "v2lite-t128", lambda: (shape_only(128, 64, dtype=torch.float32), 6, "softmax", False, 1.0)
    )
    yield ServingShape("moe.topk_plain", "qwen35-t128", lambda: (shape_only(128, 256), 8, "softmax", True, 1.0))
    yield ServingShape(
        "moe.topk_grouped", "v2-t128", lambda: (shape_only(128, 160), 6, "softmax", False, 8, 3, 16.0)
    )
    yield ServingShape(
        "moe.topk_biased_grouped",
        "v3-t128",
        lambda: (
            shape_only(128, 256, dtype=torch.float32), shape_only(256, dtype=torch.float32),
            8, "sigmoid", True, 8, 4, 2.5,
        ),
    )  # fmt: skip


def shapes() -> Iterator[ServingShape]:
    yield from _routers()
    for name in MODELS:
        # Past 2 GiB of weights Triton addresses them with 64 bits, not through a buffer descriptor.
        load = WIDE_BUFFER_LOAD if name == "v2lite" else WIDE_LOAD
        for tokens in TOKENS:
            yield ServingShape(
                "moe.fused_experts",
                f"{name}-t{tokens}",
                lambda n=name, t=tokens: _experts(n, t),
                {
                    "one_token_gate_up_kernel": (load,),
                    "one_token_down_kernel": (load,),
                    "few_tokens_kernel": (load, MFMA_BF16),
                    "many_tokens_kernel": (load, MFMA_BF16),
                },
            )
    for tokens in (8, 1024):
        yield ServingShape("moe.fused_experts", f"fp32-t{tokens}", lambda t=tokens: _experts("qwen35", t, torch.float32))
