"""Arguments without contents at which served models call the ops of ``kernels/ops/rope``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.rope.rotary import rotary
from sglang.kernels.ops.rope.rotary_tail import rotary_tail
from sglang.kernels.spec import Op
from sglang.test.amd_gate.serving_cases.tensors import bfloat16s
from sglang.test.op_cases import Case


def rotary_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Shapes of served models in bf16, without contents: latent attention, partial heads."""
    cache = torch.empty(4096, 64, device=device)
    for name, tokens, heads in (("v2lite", 1, 16), ("v2lite", 128, 16), ("v3", 128, 128)):
        positions = torch.empty(tokens, dtype=torch.int64, device=device)
        q, latent = bfloat16s(device, (tokens, heads, 192), (tokens, 576))
        case = Case(f"{name} t{tokens}", (positions, q[..., 128:], latent[:, 512:].unsqueeze(1), cache, False))
        yield rotary, case
    positions = torch.empty(128, dtype=torch.int64, device=device)
    q, k = bfloat16s(device, (128, 16, 256), (128, 2, 256))
    yield rotary, Case("qwen35 t128", (positions, q, k, cache, True))


def rotary_tail_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Outputs turned back, and queries of the indexer, in decode and prefill, without contents."""
    table = torch.empty(8192, 64, dtype=torch.float32, device=device)
    for num_rows in (32, 4096):
        positions = torch.empty(num_rows, dtype=torch.int64, device=device)
        out, queries = bfloat16s(device, (num_rows, 64, 512), (num_rows, 64, 128))
        yield rotary_tail, Case(f"v4-out t{num_rows}", (out, positions, table, True))
        yield rotary_tail, Case(f"v4-index t{num_rows}", (queries, positions, table))


CASES = (
    rotary_cases,
    rotary_tail_cases,
)
