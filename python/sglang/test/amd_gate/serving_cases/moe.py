"""Arguments without contents at which served models call the ops of ``kernels/ops/moe``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.moe.add_gated_shared import add_gated_shared
from sglang.kernels.ops.moe.fused_experts import fused_experts
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8
from sglang.kernels.ops.moe.fused_experts_mxfp4 import fused_experts_mxfp4
from sglang.kernels.ops.moe.router_logits import router_logits
from sglang.kernels.ops.moe.topk import Routing, SharedSlots, topk
from sglang.kernels.ops.quant import group_fp8, mxfp4
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.op_cases import Case

# name -> experts, hidden, intermediate, top k of served models
SERVING_MODELS = {
    "v2lite": (64, 2048, 1408, 6), "qwen35": (256, 2048, 512, 8), "v3": (256, 7168, 2048, 8),
    "v4flash": (256, 4096, 2048, 6),
}  # fmt: skip

# Bound of the clamp between the products.
SERVING_LIMITS = {"v4flash": 10.0}


def add_gated_shared_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Qwen3.5 blocks, without contents: bf16, and float32, which the proofs use."""
    for label, dtype in (("t128", torch.bfloat16), ("t128 fp32", torch.float32)):
        x, weight = (tensor.to(dtype) for tensor in bfloat16s(device, (128, 2048), (1, 2048)))
        yield add_gated_shared, Case(f"qwen35 {label}", (x, x.clone(), x.clone(), weight))


def fused_experts_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models, without contents, on every path of the Triton launcher; float32 is the proof's dtype."""
    tokens_of = {"v2lite": (1, 8, 1024), "qwen35": (1, 8, 128, 8192), "v3": (1, 8, 8192), "v4flash": (1, 8, 8192)}
    wanted = [(name, tokens, torch.bfloat16) for name, counts in tokens_of.items() for tokens in counts]
    wanted += [("qwen35", 8, torch.float32), ("qwen35", 1024, torch.float32)]
    for name, tokens, dtype in wanted:
        experts, hidden, width, top_k = SERVING_MODELS[name]
        shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
        x, w13, w2 = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        weights = torch.empty(tokens, top_k, device=device)
        label = f"{name} t{tokens}" + (" fp32" if dtype == torch.float32 else "")
        limit = SERVING_LIMITS.get(name)
        yield fused_experts, Case(label, (x, w13, w2, weights, weights.to(torch.int32), limit))


def fused_experts_fp8_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Experts of DeepSeek-V3, and of Qwen3.5 split over four ranks, without contents, on every path, in the platform's
    8-bit float."""
    dtype = fp8_dtype(current_platform.arch)

    def weights_of(experts: int, hidden: int, width: int) -> tuple[Tensor, ...]:
        shapes = ((experts, 2 * width, hidden), (experts, hidden, width))
        blocks = [(experts, rows // group_fp8.GROUP, columns // group_fp8.GROUP) for _, rows, columns in shapes]
        w13, w2 = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        w13_scale, w2_scale = (torch.empty(shape, device=device) for shape in blocks)
        return w13, w13_scale, w2, w2_scale

    experts, hidden, width, top_k = SERVING_MODELS["qwen35"]
    for tokens in (8, 1024):
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        weights = torch.empty(tokens, top_k, device=device)
        operands = (*weights_of(experts, hidden, width // 4), weights, weights.to(torch.int32))
        yield fused_experts_fp8, Case(f"qwen35 of 4 ranks t{tokens} fp8", (x, *operands))
    experts, hidden, width, top_k = SERVING_MODELS["v3"]
    w13, w13_scale, w2, w2_scale = weights_of(experts, hidden, width)
    for tokens in (1, 8, 128, 8192):
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        weights = torch.empty(tokens, top_k, device=device)
        operands = (w13, w13_scale, w2, w2_scale, weights, weights.to(torch.int32))
        yield fused_experts_fp8, Case(f"v3 t{tokens} fp8", (x, *operands))
        q, scales = group_fp8.empty_quantized(tokens, hidden, dtype, x.device)
        yield fused_experts_fp8, Case(f"v3 t{tokens} quantised fp8", (q, *operands, scales, x.dtype))


def empty_experts(experts: int, hidden: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w13, its scales, w2 and its scales, without contents."""
    shapes = ((2 * width, hidden), (hidden, width))
    sizes = [(rows, columns // part) for rows, columns in shapes for part in (mxfp4.PACKED, mxfp4.GROUP)]
    w13, w13_scale, w2, w2_scale = (torch.empty(experts, *size, dtype=torch.uint8, device=device) for size in sizes)
    return w13, w13_scale, w2, w2_scale


def fused_experts_mxfp4_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Experts of DeepSeek-V3, V4-Flash and Qwen3.5, without contents, on each path."""
    wanted = [(name, tokens, torch.bfloat16) for name in ("v3", "v4flash") for tokens in (8, 128, 8192)]
    wanted += [("qwen35", 8, torch.bfloat16), ("qwen35", 8, torch.float32), ("qwen35", 1024, torch.float32)]
    for name, tokens, dtype in wanted:
        experts, hidden, width, top_k = SERVING_MODELS[name]
        x = torch.empty(tokens, hidden, dtype=dtype, device=device)
        weights = torch.empty(tokens, top_k, device=device)
        label = f"{name} t{tokens} mxfp4" + (" fp32" if dtype == torch.float32 else "")
        stacked = empty_experts(experts, hidden, width, device)
        args = (x, *stacked, weights, weights.to(torch.int32), SERVING_LIMITS.get(name))
        yield fused_experts_mxfp4, Case(label, args)


def router_logits_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Routers of DeepSeek in bf16, without contents, on each path of the launcher."""
    for name, experts, hidden in (("v2lite", 64, 2048), ("v3", 256, 7168)):
        for tokens in (1, 8, 128, 8192):
            x, weight = bfloat16s(device, (tokens, hidden), (experts, hidden))
            yield router_logits, Case(f"{name} t{tokens}", (x, weight))


def topk_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Routers of served models for 128 tokens, without contents."""
    v2lite, v2, v3 = (torch.empty(128, experts, device=device) for experts in (64, 160, 256))
    v2lite_rule, qwen35_rule = Routing(6, "softmax", False), Routing(8, "softmax", True)
    v3_rule = Routing(8, "sigmoid", True, 8, 4, 2.5)
    yield topk, Case("v2lite t128", (v2lite, None, v2lite_rule))
    yield topk, Case("qwen35 t128", (v3.to(torch.bfloat16), None, qwen35_rule))
    yield topk, Case("v2 t128", (v2, None, Routing(6, "softmax", False, 8, 3, 16.0)))
    bias = torch.empty(256, device=device)
    yield topk, Case("v3 t128", (v3, bias, v3_rule))
    yield topk, Case("v4 t128", (v3, bias, Routing(6, "sqrtsoftplus", True, scale=1.5)))
    gated = torch.empty(128, 264, dtype=torch.bfloat16, device=device)[:, :257]
    yield topk, Case("qwen35 t128 shared", (gated, None, qwen35_rule, SharedSlots(1, gated=True)))
    yield topk, Case("v2lite t128 shared", (v2lite, None, v2lite_rule, SharedSlots(2)))
    yield topk, Case("v3 t128 shared", (v3, bias, v3_rule, SharedSlots(1)))


CASES = (
    add_gated_shared_cases,
    fused_experts_cases,
    fused_experts_fp8_cases,
    fused_experts_mxfp4_cases,
    router_logits_cases,
    topk_cases,
)
