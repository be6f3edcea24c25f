"""Arguments without contents at which served models call the ops of ``kernels/ops/quant``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.quant.group_fp8 import block_fp8_linear, empty_quantized, fp8_dtype, quantize_groups
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.op_cases import Case


def group_fp8_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Projections of DeepSeek-V3, without contents, in the platform's 8-bit float."""
    dtype = fp8_dtype(current_platform.arch)
    w = torch.empty(7168, 16384, dtype=dtype, device=device)
    scale = torch.empty(56, 128, device=device)
    for tokens in (1, 8, 64, 8192):
        (x,) = bfloat16s(device, (tokens, 16384))
        yield block_fp8_linear, Case(f"v3-o_proj t{tokens}", (x, w, scale))
        q, scales = empty_quantized(tokens, 16384, dtype, x.device)
        yield block_fp8_linear, Case(f"v3-o_proj t{tokens} quantised", (q, w, scale, scales, x.dtype))
    yield quantize_groups, Case("v3 t1", (*bfloat16s(device, (1, 7168)), dtype))


CASES = (group_fp8_cases,)
