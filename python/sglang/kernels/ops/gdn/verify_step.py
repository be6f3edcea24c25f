"""Several tokens per sequence through a gated delta net, of which only some will count: the slots do not see them yet.

A state cannot be cut back, so a slot keeps the state before a step and, as its tail, what the step's tokens brought.
The next step first runs the tail's tokens that counted, on the slot, and then its own on a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.gdn.decode_step import STEP_SHAPES, split_heads, step_inputs
from sglang.kernels.ops.gdn.reference import delta_step, gdn_gating
from sglang.kernels.ops.gdn.shapes import shape_of, step_fits_triton
from sglang.kernels.ops.norm.rmsnorm import gated_rms_norm, gated_rms_norm_torch
from sglang.kernels.spec import Case, Impl, Op

# Channels of a program of the inputs, and rows of a state that one of the recurrence holds.
CHANNELS, STATE_ROWS = 256, 32


def gdn_verify_step_torch(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, tail_qkv: Tensor, tail_gates: Tensor, tail_len: Tensor,
    slot_ids: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The mixer's rows for R more tokens of each of B sequences, packed by sequence, from their projections.

    mixed_qkv [B*R, C], z [B*R, HV, V], b, a [B*R, HV]; parameters, states and slot_ids [B] int64 as ``gdn.decode_step``
    takes them; tail_qkv [S, R, C], tail_gates [S, R, 2*HV] (b | a) in mixed_qkv's dtype, tail_len [S] int64, of which
    more than R counts as R -> [B*R, HV, V]. Each slot moves on by the first tail_len rows of its tail, which then holds
    this step's rows; the caller writes tail_len, and 0 for a new sequence. The same rows as R single steps give. A
    sequence of slot 0 is padding: its output and what slot 0 holds afterwards mean nothing.
    """
    shape, size, rows = shape_of(mixed_qkv, conv_weight, ssm_state), slot_ids.shape[0], tail_qkv.shape[1]
    lengths, slots = tail_len[slot_ids].clamp(max=rows).unsqueeze(1), torch.arange(2 * rows, device=slot_ids.device)
    # Of each sequence its columns, then the rows of its tail and its new ones; those of the tail that do not count are
    # stepped over.
    new = [part.unflatten(0, (size, rows)) for part in (mixed_qkv, b, a)]
    inputs = torch.cat([tail_qkv[slot_ids], new[0]], dim=1)
    columns = torch.cat([conv_state[slot_ids].to(inputs.dtype), inputs.transpose(1, 2)], dim=2)
    convolved, conv_state[slot_ids] = _convolved(columns, conv_weight, lengths, rows, conv_state.dtype)
    gates = torch.cat([tail_gates[slot_ids], torch.cat(new[1:], dim=-1)], dim=1)
    old_b, old_a = gates.flatten(0, 1).chunk(2, dim=-1)
    g, beta = gdn_gating(old_a, old_b, A_log, dt_bias)
    q, k, v = split_heads(convolved.flatten(0, 1), shape)
    idle = ((slots < rows) & (slots >= lengths)).view(-1, 1)  # what changes no state
    k, v = k.masked_fill(idle.unsqueeze(2), 0.0), v.masked_fill(idle.unsqueeze(2), 0.0)
    decay, beta = g.masked_fill(idle, 0.0).exp(), beta.masked_fill(idle, 0.0)
    by_step = [part.unflatten(0, (size, -1)).unbind(1) for part in (q, k, v, decay, beta)]
    states, out = ssm_state[slot_ids].float(), []
    # A host can look which rows of tails count.
    longest = int(lengths.max()) if size and slot_ids.device.type == "cpu" else rows
    for step in (*range(longest), *range(rows, 2 * rows)):
        if step == rows:
            ssm_state[slot_ids] = states.to(ssm_state.dtype)
        out.append(delta_step(states, shape.k_dim**-0.5, *(part[step] for part in by_step)))
    tail_qkv[slot_ids], tail_gates[slot_ids] = new[0], gates[:, rows:]
    answers = torch.stack(out[-rows:], dim=1).flatten(0, 1).to(mixed_qkv.dtype)
    return gated_rms_norm_torch(answers, z, norm_weight, eps)


def _convolved(columns: Tensor, weight: Tensor, lengths: Tensor, rows: int, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """columns [B, C, W-1 + 2*rows] of W-1 before, a tail of which ``lengths`` [B, 1] count, and the new ones -> their
    convolutions [B, 2*rows, C], and the W-1 columns behind the tail, [B, C, W-1] of dtype ``kept``."""
    (size, channels, _), width = columns.shape, weight.shape[1]
    # Places of the windows of each row: the tail's own, and behind it those that the new rows see.
    taps = torch.arange(width, device=columns.device)
    tails = torch.arange(rows, device=columns.device).unsqueeze(1) + taps
    seen = lengths.unsqueeze(2) + tails
    seen = torch.where(seen < lengths.unsqueeze(2) + width - 1, seen, seen + rows - lengths.unsqueeze(2))
    places = torch.cat([tails.expand(size, -1, -1), seen], dim=1).flatten(1)
    windows = columns.gather(2, places.unsqueeze(1).expand(-1, channels, -1)).unflatten(2, (-1, width))
    summed = (windows.float() * weight.float().unsqueeze(1)).sum(-1)
    behind = (lengths + taps[:-1]).unsqueeze(1).expand(-1, channels, -1)
    return F.silu(summed).to(columns.dtype).transpose(1, 2), columns.gather(2, behind).to(kept)


def gdn_verify_step_triton(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, tail_qkv: Tensor, tail_gates: Tensor, tail_len: Tensor,
    slot_ids: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Three launches: inputs of all tokens, the recurrence, which reads and writes a state once, and the norm."""
    from sglang.kernels.ops.gdn.verify_step_triton import verify_inputs_kernel, verify_scan_kernel

    shape, size, repeat = shape_of(mixed_qkv, conv_weight, ssm_state), slot_ids.shape[0], tail_qkv.shape[1]
    channels, heads, device = mixed_qkv.shape[1], shape.value_heads, mixed_qkv.device
    out = torch.empty(size * repeat, heads, shape.v_dim, dtype=mixed_qkv.dtype, device=device)
    if not size:
        return out
    conv = torch.empty(size, 2 * repeat, channels, dtype=mixed_qkv.dtype, device=device)
    gates = torch.empty(size, 2 * repeat, 2, heads, dtype=torch.float32, device=device)
    verify_inputs_kernel[(cdiv(channels, CHANNELS) + 1, size)](
        mixed_qkv, b, a, conv_weight, A_log, dt_bias, conv_state, tail_qkv, tail_gates, tail_len, slot_ids, conv, gates,
        mixed_qkv.stride(0), b.stride(0), a.stride(0), conv_state.stride(0), channels, heads,
        WIDTH=shape.width, BLOCK_W=next_power_of_2(shape.width), REPEAT=repeat, BLOCK=CHANNELS,
        BLOCK_H=next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    rows = min(STATE_ROWS, next_power_of_2(shape.v_dim))
    verify_scan_kernel[(heads * cdiv(shape.v_dim, rows), size)](
        conv, gates, ssm_state, tail_len, slot_ids, out,
        ssm_state.stride(0), channels, shape.key_heads, heads, shape.per_key, shape.k_dim**-0.5,
        K=shape.k_dim, V=shape.v_dim, REPEAT=repeat, ROWS=rows, BLOCK_K=next_power_of_2(shape.k_dim), num_warps=4,
    )  # fmt: skip
    return gated_rms_norm(out, z, norm_weight, eps)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for size, rows, shape in (
        (1, 2, STEP_SHAPES[0]),
        (3, 4, STEP_SHAPES[1]),
        (5, 3, STEP_SHAPES[2]),
        (2, 2, STEP_SHAPES[3]),
    ):
        *inputs, conv, ssm = step_inputs(size * rows, size + 3, shape, generator)
        old = step_inputs((size + 3) * rows, 1, shape, generator)
        tail_qkv = old[0].unflatten(0, (size + 3, rows)).contiguous()
        tail_gates = torch.cat(old[2:4], dim=-1).unflatten(0, (size + 3, rows)).contiguous()
        lengths = torch.randint(0, rows + 1, (size + 3,), generator=generator)
        slots = torch.randperm(size + 2, generator=generator)[:size] + 1
        lengths[slots[-1:]] = 1 << 40  # all of the tail, and no more
        name = f"{size}x{rows} " + "x".join(map(str, shape))
        yield Case(name, (*inputs, conv, ssm, tail_qkv, tail_gates, lengths, slots, 1e-6))


gdn_verify_step = Op(
    "gdn.verify_step",
    triton_impl(gdn_verify_step_triton, step_fits_triton),
    Impl("torch", gdn_verify_step_torch),
    cases=_cases,
)
