"""The gated delta rule over packed sequences, in chunks whose tokens are solved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_SIZE = 64


def chunk_table(seq_lens: Sequence[int], size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor]:
    """Where packed sequences and their chunks are, on the host.

    bounds [B + 1] int64, and chunks [NC, 2] int32: the sequence and the index in it of each chunk of ``size`` rows.
    """
    lengths = torch.tensor(seq_lens, dtype=torch.int64)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    counts = (lengths + size - 1) // size
    sequence = torch.repeat_interleave(torch.arange(len(seq_lens)), counts)
    index = torch.arange(sequence.shape[0]) - (counts.cumsum(0) - counts)[sequence]
    return bounds, torch.stack((sequence, index), dim=1).int()


@dataclass(frozen=True)
class _ChunkPlan:
    """How packed rows map to chunks: NC chunks of ``size`` rows, each inside one sequence."""

    size: int
    sequence: Tensor  # [NC] on the host, as is index
    index: Tensor  # [NC] of the chunk in its sequence
    source: Tensor  # [NC * size] packed row of each chunk row; a tail repeats its sequence's last row
    padding: Tensor  # [NC * size] bool, True for the rows of a tail
    target: Tensor  # [N] chunk row of each packed row


def _plan(seq_lens: Sequence[int], device: torch.device) -> _ChunkPlan:
    size = min(CHUNK_SIZE, max(seq_lens))
    bounds, chunks = chunk_table(seq_lens, size)
    sequence, index = chunks.long().unbind(1)
    first, length = bounds[sequence, None], (bounds[1:] - bounds[:-1])[sequence, None]
    local = index.unsqueeze(1) * size + torch.arange(size)
    padding = (local >= length).flatten()
    source = (first + local.minimum(length - 1)).flatten()
    target = (~padding).nonzero().squeeze(1)
    return _ChunkPlan(size, sequence, index, source.to(device), padding.to(device), target.to(device))


@dataclass(frozen=True)
class _Solved:
    """What the chunks know without the state that enters them; all [NC, HV, size, ...] float32."""

    new_values: Tensor  # [.., V] values to write if the incoming state were zero
    state_reads: Tensor  # [.., K] keys that read the incoming state
    queries: Tensor  # [.., K] decayed, scaled queries on the incoming state
    scores: Tensor  # [.., size] decayed, scaled query-key products, causal
    writes: Tensor  # [.., K] keys decayed to the chunk's end
    decay: Tensor  # [NC, HV] decay over the whole chunk


def _solve_chunks(plan: _ChunkPlan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> _Solved:
    key_heads, value_heads = k.shape[1], v.shape[1]

    def by_chunk(x: Tensor, heads: int) -> Tensor:
        rows = x.float().index_select(0, plan.source)
        return rows.view(-1, plan.size, key_heads, heads // key_heads, *x.shape[2:]).movedim(1, 3)

    # [NC, HK, r, size, ...]; r is 1 for queries and keys and broadcasts over the value heads that read them.
    q, k, v = by_chunk(q, key_heads) * scale, by_chunk(k, key_heads), by_chunk(v, value_heads)
    tail = plan.padding.view(-1, 1, 1, plan.size)
    g = by_chunk(g, value_heads).masked_fill(tail, 0.0)
    beta = by_chunk(beta, value_heads).masked_fill(tail, 0.0).unsqueeze(-1)

    # Differences of long sums: float64, or strong decay early in a chunk blurs weak decay later in it.
    total = g.double().cumsum(-1)
    above = torch.ones(plan.size, plan.size, dtype=torch.bool, device=g.device).triu(1)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    # Masked before exp: above the diagonal the differences are positive and overflow, and inf * 0 is NaN.
    decay = between.masked_fill_(above, float("-inf")).float().exp_()
    since_start = total.float().exp().unsqueeze(-1)
    until_end = (total[..., -1:] - total).float().exp().unsqueeze(-1)

    mixing = (k @ k.transpose(-1, -2) * decay).mul_(beta)
    values_and_keys = torch.cat((beta * v, beta * since_start * k), dim=-1)
    # Forward substitution of (I + strictly lower part); the upper part and the diagonal are not read.
    solved = torch.linalg.solve_triangular(mixing, values_and_keys, upper=False, unitriangular=True)
    new_values, state_reads = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    scores = q @ k.transpose(-1, -2) * decay
    return _Solved(
        new_values=new_values.flatten(1, 2),
        state_reads=state_reads.flatten(1, 2),
        queries=(q * since_start).flatten(1, 2),
        scores=scores.flatten(1, 2),
        writes=(k * until_end).flatten(1, 2),
        decay=since_start[..., -1, 0].flatten(1, 2),
    )


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, seq_lens: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence of ``recurrent_gated_delta_rule`` over whole sequences.

    q, k [N, HK, K] (unit length), v [N, HV, V], g, beta [N, HV] float32 hold B sequences one after the other,
    ``seq_lens`` their lengths on the host (zero is allowed), initial_state [B, HV, V, K] -> o [N, HV, V] in v's dtype
    and the final states [B, HV, V, K] float32. Yang et al. 2024 (Gated Delta Networks), section 3.3.
    """
    states = initial_state.float().clone()
    if v.shape[0] == 0:
        return torch.empty_like(v), states
    plan = _plan(seq_lens, v.device)
    solved = _solve_chunks(plan, q, k, v, g, beta, scale)
    out = torch.empty_like(solved.new_values)
    for step in range(int(plan.index.max()) + 1):
        at_step = plan.index == step
        chunks, rows = at_step.nonzero().squeeze(1).to(v.device), plan.sequence[at_step].to(v.device)
        state = states[rows]
        written = solved.new_values[chunks] - solved.state_reads[chunks] @ state.transpose(-1, -2)
        out[chunks] = solved.queries[chunks] @ state.transpose(-1, -2) + solved.scores[chunks] @ written
        kept = state.mul_(solved.decay[chunks, :, None, None])
        states[rows] = kept + written.transpose(-1, -2) @ solved.writes[chunks]
    packed = out.transpose(1, 2).reshape(-1, *v.shape[1:]).index_select(0, plan.target)
    return packed.to(v.dtype), states
