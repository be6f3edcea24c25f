"""The gated delta rule over packed sequences, in chunks whose tokens are solved together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang.kernels.spec import Case, Impl, Op

CHUNK_SIZE = 64


@dataclass(frozen=True)
class _ChunkPlan:
    """How packed rows map to chunks: NC chunks of ``size`` rows, each inside one sequence."""

    size: int
    first: tuple[int, ...]  # [B] first chunk of each sequence
    counts: tuple[int, ...]  # [B] chunks of each sequence
    source: torch.Tensor  # [NC * size] packed row of each chunk row; a tail repeats its sequence's last row
    padding: torch.Tensor  # [NC * size] bool, True for the rows of a tail
    target: torch.Tensor  # [N] chunk row of each packed row


def _plan(seq_lens: Sequence[int], device: torch.device) -> _ChunkPlan:
    size = min(CHUNK_SIZE, max(seq_lens))
    counts = tuple(-(-length // size) for length in seq_lens)
    first, sources, paddings, targets = [], [], [], []
    start = chunks = 0
    for length, count in zip(seq_lens, counts, strict=True):
        local = torch.arange(count * size)
        sources.append(start + local.clamp(max=length - 1))
        paddings.append(local >= length)
        targets.append(torch.arange(chunks * size, chunks * size + length))
        first.append(chunks)
        start += length
        chunks += count
    source, padding, target = (torch.cat(parts).to(device) for parts in (sources, paddings, targets))
    return _ChunkPlan(size, tuple(first), counts, source, padding, target)


@dataclass(frozen=True)
class _Solved:
    """What the chunks know without the state that enters them; all [NC, HV, size, ...] float32."""

    new_values: torch.Tensor  # [.., V] values to write if the incoming state were zero
    state_reads: torch.Tensor  # [.., K] keys that read the incoming state
    queries: torch.Tensor  # [.., K] decayed, scaled queries on the incoming state
    scores: torch.Tensor  # [.., size] decayed, scaled query-key products, causal
    writes: torch.Tensor  # [.., K] keys decayed to the chunk's end
    decay: torch.Tensor  # [NC, HV] decay over the whole chunk


def _solve_chunks(
    plan: _ChunkPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
) -> _Solved:
    key_heads, value_heads = k.shape[1], v.shape[1]

    def by_chunk(x: torch.Tensor, heads: int) -> torch.Tensor:
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


def chunk_gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    seq_lens: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of ``gdn.recurrent_gated_delta_rule`` over whole sequences.

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
    for step in range(max(plan.counts)):
        active = [i for i, count in enumerate(plan.counts) if count > step]
        rows = torch.tensor(active, device=v.device)
        chunks = torch.tensor([plan.first[i] + step for i in active], device=v.device)
        state = states[rows]
        written = solved.new_values[chunks] - solved.state_reads[chunks] @ state.transpose(-1, -2)
        out[chunks] = solved.queries[chunks] @ state.transpose(-1, -2) + solved.scores[chunks] @ written
        kept = state.mul_(solved.decay[chunks, :, None, None])
        states[rows] = kept + written.transpose(-1, -2) @ solved.writes[chunks]
    packed = out.transpose(1, 2).reshape(-1, *v.shape[1:]).index_select(0, plan.target)
    return packed.to(v.dtype), states


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 8, 8), (2, 2, 32, 32), (2, 3, 32, 48))
    for seq_lens in ((1,), (2, 3), (63, 64, 65), (130,), (0, 5), ()):
        for key_heads, per_key, k_dim, v_dim in shapes:
            num_tokens, heads = sum(seq_lens), key_heads * per_key
            q, k = torch.randn(2, num_tokens, key_heads, k_dim, generator=generator)
            q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
            v = torch.randn(num_tokens, heads, v_dim, generator=generator)
            g = -torch.rand(num_tokens, heads, generator=generator) * 4
            beta = torch.rand(num_tokens, heads, generator=generator)
            state = torch.randn(len(seq_lens), heads, v_dim, k_dim, generator=generator)
            name = f"{'+'.join(map(str, seq_lens)) or 'empty'}-{heads}x{v_dim}x{k_dim}"
            yield Case(name, (q, k, v, g, beta, state, list(seq_lens), k_dim**-0.5))


chunk_gated_delta_rule = Op("gdn.chunk_gated_delta_rule", Impl("torch", chunk_gated_delta_rule_torch), cases=_cases)
