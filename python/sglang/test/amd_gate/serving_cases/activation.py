"""Arguments without contents at which served models call the ops of ``kernels/ops/activation``."""

from __future__ import annotations

from collections.abc import Iterator

from sglang.kernels.ops.activation.sigmoid_mul import sigmoid_mul
from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul, silu_and_mul_quantized
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.op_cases import Case


def sigmoid_mul_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """The output gate of Qwen3.5's attention in bf16, without contents."""
    for tokens in (1, 8192):
        out, both = bfloat16s(device, (tokens, 16, 256), (tokens, 16, 2, 256))
        yield sigmoid_mul, Case(f"qwen35 t{tokens}", (out, both[:, :, 1]))


def silu_and_mul_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents: shared experts and dense layers."""
    for name, width in (("v2lite-shared", 2816), ("v3-dense", 18432), ("qwen35-shared", 512)):
        yield silu_and_mul, Case(f"{name} t128", (*bfloat16s(device, (128, 2 * width)),))
    yield silu_and_mul, Case("v4flash-shared t128", (*bfloat16s(device, (128, 2 * 2048)), 10.0))


def silu_and_mul_quantized_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Dense layers of DeepSeek-V3 and V4's clamped shared expert before 8-bit products, without contents."""
    dtype = fp8_dtype(current_platform.arch)
    for tokens in (1, 128):
        rows = bfloat16s(device, (tokens, 2 * 18432))
        yield silu_and_mul_quantized, Case(f"v3-dense t{tokens} fp8", (*rows, dtype))
    shared = bfloat16s(device, (128, 2 * 2048))
    yield silu_and_mul_quantized, Case("v4flash-shared t128 fp8", (*shared, dtype, 10.0))


CASES = (
    sigmoid_mul_cases,
    silu_and_mul_cases,
    silu_and_mul_quantized_cases,
)
