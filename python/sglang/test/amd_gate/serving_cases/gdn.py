"""Arguments without contents at which served models call the ops of ``kernels/ops/gdn``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from sglang.kernels.ops.gdn.chunk import chunk_table
from sglang.kernels.ops.gdn.decode_step import gdn_decode_step
from sglang.kernels.ops.gdn.extend_step import gdn_extend_step
from sglang.kernels.ops.gdn.verify_step import gdn_verify_step
from sglang.kernels.spec import Op
from sglang.test.op_cases import Case
from sglang.test.op_cases.gdn import step_inputs

# Qwen3.5 35B, 27B and 397B, as above.
GDN_SHAPES = tuple((16, per_key, 128, 128, 4) for per_key in (2, 3, 4))


def decode_step_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Decode batches of Qwen3.5."""
    for shape, rows in product(GDN_SHAPES, (1, 32, 128)):
        inputs = step_inputs(rows, rows + 1, shape, dtype=torch.bfloat16, device=device)
        slot_ids = torch.empty(rows, dtype=torch.int64, device=device)
        yield gdn_decode_step, Case(f"{shape[0]}x{shape[0] * shape[1]} bs{rows}", (*inputs, slot_ids, 1e-6))


def extend_step_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Prefill batches of Qwen3.5."""
    for shape, (batch, length) in product(GDN_SHAPES, ((1, 1024), (8, 1024), (1, 8192), (3, 100))):
        inputs = step_inputs(batch * length, batch + 1, shape, dtype=torch.bfloat16, device=device)
        slot_ids = torch.empty(batch, dtype=torch.int64, device=device)
        table = (part.to(device) for part in chunk_table([length] * batch))
        name = f"{shape[0]}x{shape[0] * shape[1]} {batch}x{length}"
        yield gdn_extend_step, Case(name, (*inputs, slot_ids, *table, 1e-6))


def verify_step_cases(device: str = "meta") -> Iterator[tuple[Op, Case]]:
    """Verify steps of Qwen3.5, of two and of four rows per sequence."""
    for shape, (size, rows) in product(GDN_SHAPES, ((1, 4), (32, 2), (32, 4))):
        inputs = step_inputs(size * rows, size + 1, shape, dtype=torch.bfloat16, device=device)
        tail_qkv = inputs[0].new_empty(size + 1, rows, inputs[0].shape[1])
        tail_gates = inputs[0].new_empty(size + 1, rows, 2 * inputs[2].shape[1])
        slots = torch.empty(size, dtype=torch.int64, device=device)
        name = f"{shape[0]}x{shape[0] * shape[1]} {size}x{rows}"
        tail_len = slots.new_empty(size + 1)
        yield gdn_verify_step, Case(name, (*inputs, tail_qkv, tail_gates, tail_len, slots, 1e-6))


CASES = (
    decode_step_cases,
    extend_step_cases,
    verify_step_cases,
)
