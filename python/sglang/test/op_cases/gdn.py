"""Cases of the ops ``gdn.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from sglang.kernels.ops.gdn.chunk import chunk_table
from sglang.test.op_cases import Case

# key heads, value heads a key head, K, V, W
STEP_SHAPES = ((1, 1, 8, 8, 4), (2, 2, 32, 32, 4), (2, 3, 32, 48, 4), (1, 4, 16, 24, 2), (3, 1, 24, 16, 3))


def step_inputs(
    rows: int, slots: int, shape: tuple[int, int, int, int, int], generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Random arguments up to ``ssm_state`` of either step, with z, b and a as the strided views that a layer has.

    Of ``dtype``, except decay rates and states, which serving keeps in float32 too.
    """
    key_heads, per_key, k_dim, v_dim, width = shape
    heads = key_heads * per_key
    channels = 2 * key_heads * k_dim + heads * v_dim

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)

    mixed_qkv, z = normal(rows, channels + heads * v_dim).split((channels, heads * v_dim), dim=-1)
    b, a = normal(rows, 2 * heads).chunk(2, dim=-1)
    A_log = torch.empty(heads, device=device).uniform_(generator=generator).mul(16).log()
    parameters = (normal(channels, width), A_log, normal(heads), normal(v_dim))
    states = (normal(slots, channels, width - 1), normal(slots, heads, v_dim, k_dim, dtype=torch.float32))
    return (mixed_qkv, z.unflatten(-1, (heads, v_dim)), b, a, *parameters, *states)


def decode_step() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, shape in product((1, 5), STEP_SHAPES):
        slot_ids = torch.randperm(rows + 2, generator=generator)[:rows] + 1
        inputs = step_inputs(rows, rows + 3, shape, generator)
        yield Case(f"{rows}x" + "x".join(map(str, shape)), (*inputs, slot_ids, 1e-6))
    # The state of the last row and head is NaN from here on, and no other.
    inputs = step_inputs(5, 8, STEP_SHAPES[1], generator)
    inputs[3][-1, -1] = torch.nan
    yield Case("5-nan-gate", (*inputs, slot_ids, 1e-6))
    nobody = torch.empty(0, dtype=torch.int64)
    yield Case("empty", (*step_inputs(0, 2, STEP_SHAPES[0], generator), nobody, 1e-6))


def extend_step() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    several = product(((2, 3), (0, 1, 5)), STEP_SHAPES)
    long = (((63, 64, 65), STEP_SHAPES[0]), ((130,), STEP_SHAPES[2]), ((66,), STEP_SHAPES[4]))
    for seq_lens, shape in (*several, *long):
        slot_ids = torch.randperm(len(seq_lens) + 2, generator=generator)[: len(seq_lens)] + 1
        inputs = step_inputs(sum(seq_lens), len(seq_lens) + 3, shape, generator)
        name = "+".join(map(str, seq_lens)) + "-" + "x".join(map(str, shape))
        yield Case(name, (*inputs, slot_ids, *chunk_table(seq_lens), 1e-6))
        if len(seq_lens) > 1 and shape == STEP_SHAPES[1]:
            # The first gate of a sequence: all that follows of this head is NaN.
            inputs = step_inputs(sum(seq_lens), len(seq_lens) + 3, shape, generator)
            inputs[3][seq_lens[0], 1] = torch.nan
            yield Case(f"{name}-nan-gate", (*inputs, slot_ids, *chunk_table(seq_lens), 1e-6))
    for name, nothing in (("no-sequence", []), ("no-token", [0])):
        inputs = step_inputs(0, 3, STEP_SHAPES[1], generator)
        slot_ids = torch.ones(len(nothing), dtype=torch.int64)
        yield Case(name, (*inputs, slot_ids, *chunk_table(nothing), 1e-6))


def verify_step() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for size, rows, shape, broken in (
        (1, 2, STEP_SHAPES[0], False),
        (3, 4, STEP_SHAPES[1], False),
        (5, 3, STEP_SHAPES[2], False),
        (2, 2, STEP_SHAPES[3], False),
        (2, 2, STEP_SHAPES[3], True),
    ):
        *inputs, conv, ssm = step_inputs(size * rows, size + 3, shape, generator)
        old = step_inputs((size + 3) * rows, 1, shape, generator)
        tail_qkv = old[0].unflatten(0, (size + 3, rows)).contiguous()
        tail_gates = torch.cat(old[2:4], dim=-1).unflatten(0, (size + 3, rows)).contiguous()
        lengths = torch.randint(0, rows + 1, (size + 3,), generator=generator)
        slots = torch.randperm(size + 2, generator=generator)[:size] + 1
        lengths[slots[-1:]] = 1 << 40  # all of the tail, and no more
        name = f"{size}x{rows} " + "x".join(map(str, shape))
        if broken:
            inputs[3][1, 0] = torch.nan
            name += "-nan-gate"
        yield Case(name, (*inputs, conv, ssm, tail_qkv, tail_gates, lengths, slots, 1e-6))
