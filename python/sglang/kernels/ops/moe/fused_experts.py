"""The routed experts of a Mixture-of-Experts layer: both products, the activation and the weighted sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sglang.kernels.spec import Case, Impl, Op


def fused_experts_torch(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """``y[n] = sum_j weights[n, j] * w2[e] (silu(w1[e] x[n]) * (w3[e] x[n]))`` with ``e = ids[n, j]``.

    x [N, H], w13 [E, 2I, H] (gate rows, then up rows), w2 [E, H, I], topk_weights [N, k] float32, topk_ids [N, k]
    integers in [-1, E): -1 adds nothing, and an expert may stand in a row more than once. Returns a new [N, H] in
    x's dtype; x is never written. The sum over j is in float32.
    """
    num_tokens, hidden = x.shape
    top_k = topk_ids.shape[1]
    experts, intermediate = w13.shape[0], w2.shape[2]
    flat = topk_ids.reshape(-1).long()
    order = flat.argsort(stable=True)
    # The one copy of routing data to the host: rows of each expert, those of id -1 first.
    counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    skipped = counts[0]
    rows = x.index_select(0, order // top_k)
    gate_up = rows.new_empty(num_tokens * top_k, 2 * intermediate)
    active = []
    start = skipped
    for expert, count in enumerate(counts[1:]):
        if count:
            active.append((expert, start, start + count))
            torch.mm(rows[start : start + count], w13[expert].t(), out=gate_up[start : start + count])
            start += count
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) * up
    for expert, start, end in active:
        torch.mm(activated[start:end], w2[expert].t(), out=rows[start:end])
    if skipped:
        rows[:skipped] = 0
        topk_weights = topk_weights.masked_fill(topk_ids < 0, 0.0)
    by_token = torch.empty_like(rows).index_copy_(0, order, rows).view(num_tokens, top_k, hidden)
    return torch.bmm(topk_weights.float().unsqueeze(1), by_token.float()).squeeze(1).to(x.dtype)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        ("one-row", 1, 8, 4, 4, 2),
        ("odd", 7, 12, 6, 5, 3),
        ("empty", 0, 8, 4, 4, 2),
        ("batch", 40, 32, 16, 8, 4),
    )
    for name, rows, hidden, intermediate, experts, top_k in shapes:
        x = torch.randn(rows, hidden, generator=generator)
        w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
        w2 = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
        weights = torch.rand(rows, top_k, generator=generator)
        ids = torch.randint(0, experts, (rows, top_k), generator=generator, dtype=torch.int32)
        yield Case(name, (x, w13, w2, weights, ids))
        if rows > 1:
            yield Case(f"{name}-one-expert", (x, w13, w2, weights, torch.full_like(ids, experts - 1)))
            holes = ids.masked_fill(torch.rand(rows, top_k, generator=generator) < 0.4, -1)
            yield Case(f"{name}-holes", (x, w13, w2, weights, holes))
            yield Case(f"{name}-all-skipped", (x, w13, w2, weights, torch.full_like(ids, -1)))


fused_experts = Op("moe.fused_experts", Impl("torch", fused_experts_torch), cases=_cases)
