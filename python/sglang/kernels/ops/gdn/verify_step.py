"""Several tokens per sequence through a gated delta net, of which only some will count: the slots do not see them yet.

A state cannot be cut back, so a slot keeps the state before a step and, as its tail, what the step's tokens brought.
The next step first runs the tail's tokens that counted, on the slot, and then its own on a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.gdn.decode_step import split_heads
from sglang.kernels.ops.gdn.reference import gdn_gating
from sglang.kernels.ops.gdn.shapes import shape_of, step_fits_triton
from sglang.kernels.ops.norm.rmsnorm import gated_rms_norm, gated_rms_norm_torch
from sglang.kernels.spec import Impl, Op

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
    lengths = tail_len.index_select(0, slot_ids).clamp(0, rows)
    # A host can look which rows of tails count; rows before a shorter tail than the longest change no state.
    longest = int(lengths.max()) if size and slot_ids.device.type == "cpu" else rows
    before = (longest - lengths).unsqueeze(1)
    ragged = slot_ids.device.type != "cpu" or bool(before.any())
    idle = torch.arange(longest + rows, device=slot_ids.device) < before if ragged else None

    def behind(tail: Tensor, new: Tensor, *first: Tensor) -> Tensor:
        """Rows [B, ..., C] of each sequence that end with its new ones; what stands before them means nothing."""
        tail, new = tail.index_select(0, slot_ids)[:, :longest], new.unflatten(0, (size, rows))
        lines = torch.cat([*first, tail, new], dim=1)
        if not ragged:
            return lines
        places = torch.arange(lines.shape[1], device=lines.device)
        places = torch.where(places < lines.shape[1] - rows, (places - before).clamp(min=0), places)
        return lines.gather(1, places.unsqueeze(2).expand(-1, -1, lines.shape[2]))

    columns = conv_state.index_select(0, slot_ids).transpose(1, 2).to(mixed_qkv.dtype)
    lines, history = behind(tail_qkv, mixed_qkv, columns), columns.shape[1]
    columns = lines[:, longest : longest + history].transpose(1, 2)
    conv_state.index_copy_(0, slot_ids, columns.to(conv_state.dtype))
    convolved = F.silu((lines.unfold(1, history + 1, 1).float() * conv_weight.float()).sum(-1)).to(lines.dtype)
    gates = behind(tail_gates, torch.cat((b, a), dim=-1))
    old_b, old_a = gates.chunk(2, dim=-1)
    g, beta = gdn_gating(old_a, old_b, A_log, dt_bias)
    parts = (*split_heads(convolved.flatten(0, 1), shape), g.flatten(0, 1), beta.flatten(0, 1))
    by_head = [part.unflatten(0, (size, -1)).transpose(1, 2) for part in parts]
    if idle is not None:
        by_head = [part.masked_fill(idle.view(size, 1, -1, *[1] * (part.dim() - 3)), 0.0) for part in by_head]
    states = ssm_state.index_select(0, slot_ids).float()
    answers, states = _solve(states, longest, shape.k_dim**-0.5, *by_head)
    ssm_state.index_copy_(0, slot_ids, states.to(ssm_state.dtype))
    tail_qkv.index_copy_(0, slot_ids, lines[:, -rows:])
    tail_gates.index_copy_(0, slot_ids, gates[:, -rows:])
    return gated_rms_norm_torch(answers.transpose(1, 2).flatten(0, 1).to(mixed_qkv.dtype), z, norm_weight, eps)


def _solve(
    states: Tensor, tail: int, scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """``delta_step`` of T rows solved together: answers [B, HV, T - tail, V] of all but the first ``tail``, and the
    states after those.

    states [B, HV, V, K] float32, q, k [B, HK, T, K], v [B, HV, T, V], g and beta [B, HV, T]. Yang et al. 2024 (Gated
    Delta Networks), section 3.3, for one chunk.
    """
    size, key_heads, steps = k.shape[:3]
    # The rows that write, then those that read. [B, HK, value heads of a key head, T + T - tail, ...]
    keys, by_key = torch.cat((k, q[:, :, tail:]), dim=2), (size, key_heads, v.shape[1] // key_heads)
    # Differences of sums: float64, or strong decay early blurs weak decay later.
    total = g.double().cumsum(-1).view(*by_key, steps)
    reached = torch.cat((total, total[..., tail:]), dim=-1)
    places = torch.arange(steps, device=k.device)
    later = places > torch.cat((places, places[tail:])).unsqueeze(1)
    # Masked before exp: differences to later rows are positive and overflow, and inf * 0 is NaN.
    decay = (reached.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(later, -torch.inf).float().exp_()
    mixed = (keys @ k.transpose(-1, -2)).unsqueeze(2) * decay
    grouped = states.view(*by_key, *states.shape[2:])
    since = reached.float().exp().unsqueeze(-1)
    reads = keys.unsqueeze(2) @ grouped.transpose(-1, -2) * since
    rate = beta.reshape(*by_key, steps, 1)
    wanted = (v.reshape(*by_key, *v.shape[2:]).float() - reads[..., :steps, :]) * rate
    # Forward substitution of (I + strictly lower part); the upper part and the diagonal are not read.
    written = torch.linalg.solve_triangular(mixed[..., :steps, :] * rate, wanted, upper=False, unitriangular=True)
    answers = (reads[..., steps:, :] + _causal_product(mixed[..., steps:, :], written)) * scale
    if tail:
        # Row ``tail - 1`` of the decay is what is left of each write after the tail.
        left = written[..., :tail, :] * decay[..., tail - 1, :tail].unsqueeze(-1)
        grouped = grouped * since[..., tail - 1 : tail, :] + left.transpose(-1, -2) @ k[:, :, :tail].unsqueeze(2)
    return answers.flatten(1, 2), grouped.flatten(1, 2)


def _causal_product(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [..., R, T] times rows [..., T, V], where weight r meets the first T - R + 1 + r rows, whatever the
    others hold: a token that will not count may have brought NaN."""
    if rows.device.type == "cpu" and bool(rows.isfinite().all()):
        return weights @ rows
    ends = range(rows.shape[-2] - weights.shape[-2] + 1, rows.shape[-2] + 1)
    parts = [weights[..., i : i + 1, :end] @ rows[..., :end, :] for i, end in enumerate(ends)]
    return torch.cat(parts, dim=-2)


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


gdn_verify_step = Op(
    "gdn.verify_step", triton_impl(gdn_verify_step_triton, step_fits_triton), Impl("torch", gdn_verify_step_torch)
)
