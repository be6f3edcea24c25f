"""Arguments without contents at which served models call the ops of ``kernels/ops/norm``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.norm.add_norm_logits import add_norm_logits
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm
from sglang.kernels.ops.norm.rmsnorm import gated_rms_norm, rms_norm
from sglang.kernels.ops.norm.rmsnorm_quantized import rms_norm_quantized
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.op_cases import Case


def fused_add_rmsnorm_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents."""
    for name, dim in (("v2lite", 2048), ("v3", 7168)):
        for tokens in (1, 128):
            x, residual, weight = bfloat16s(device, (tokens, dim), (tokens, dim), (dim,))
            yield fused_add_rms_norm, Case(f"{name} t{tokens}", (x, residual, weight, 1e-6))
    x, residual, weight = bfloat16s(device, (128, 2048), (128, 2048), (2048,))
    yield fused_add_rms_norm, Case("qwen35 t128", (x, residual, weight, 1e-6, True))


def rmsnorm_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents: DeepSeek and Qwen3.5 layers."""
    x, latent, heads, weight = bfloat16s(device, (128, 7168), (128, 576), (128, 16, 512), (7168,))
    gated, gate = bfloat16s(device, (128, 32, 128), (128, 32, 128))
    yield rms_norm, Case("v3 t128", (x, weight, 1e-6))
    yield rms_norm, Case("v4 t128", (x, torch.empty(7168, dtype=torch.float32, device=device), 1e-6))
    yield rms_norm, Case("latent t128", (latent[:, :512], weight[:512], 1e-6))
    yield rms_norm, Case("qwen35-heads t128", (heads[..., :256], weight[:256], 1e-6, True))
    yield gated_rms_norm, Case("qwen35-gdn t128", (gated, gate, weight[:128], 1e-6))


def rmsnorm_quantized_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """DeepSeek-V3's norms before 8-bit products, without contents, in both layouts of the scales."""
    dtype = fp8_dtype(current_platform.arch)
    for tokens in (1, 128):
        x, residual, weight = bfloat16s(device, (tokens, 7168), (tokens, 7168), (7168,))
        yield rms_norm_quantized, Case(f"v3 t{tokens} fp8", (x, residual, weight, 1e-6, dtype))
        latent, gain = bfloat16s(device, (tokens, 2112), (1536,))
        yield rms_norm_quantized, Case(f"v3-q_a t{tokens} fp8", (latent[:, :1536], None, gain, 1e-6, dtype))


def add_norm_logits_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """The norms before the routers of served models for one row, without contents."""
    for name, dim, experts in (("v2lite", 2048, 64), ("v3", 7168, 256), ("qwen35", 2048, 264)):
        x, residual, weight, gate = bfloat16s(device, (1, dim), (1, dim), (dim,), (experts, dim))
        gemma = name == "qwen35"
        args = (x, residual, weight, 1e-6, gate, torch.bfloat16 if gemma else torch.float32, gemma)
        yield add_norm_logits, Case(f"{name} t1", args)
        if name == "v3":
            yield add_norm_logits, Case(f"{name} t1 fp8", (*args, fp8_dtype(current_platform.arch)))


CASES = (
    add_norm_logits_cases,
    fused_add_rmsnorm_cases,
    rmsnorm_cases,
    rmsnorm_quantized_cases,
)
