"""Attention in float64, one query and one head at a time: the reference for attention ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query [D], keys [n, D], values [n, Dv] -> [Dv]."""
    logits = keys.double() @ query.double() * scale
    probs = torch.exp(logits - logits.max())
    return values.double().T @ (probs / probs.sum())


def true_extend_ragged(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, scale: float, k_tail: Tensor | None = None
) -> Tensor:
    if k_tail is not None:
        k = torch.stack([torch.hstack((k[:, head], k_tail)) for head in range(k.shape[1])], dim=1)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    bounds = zip(qo_indptr.tolist(), qo_indptr.tolist()[1:], kv_indptr.tolist(), kv_indptr.tolist()[1:])
    for first, last, start, end in bounds:
        for row in range(first, last):
            seen = slice(start, end - (last - 1 - row))
            for head in range(q.shape[1] if end > start else 0):
                out[row, head] = attend(q[row, head], k[seen, head // group], v[seen, head // group], scale)
    return out


def true_extend_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, qo_indptr: Tensor, kv_indptr: Tensor,
    scale: float, rank: int = 0,
) -> Tensor:  # fmt: skip
    values = k_cache[..., :rank] if v_cache is None else v_cache
    return true_extend_ragged(q, k_cache[slots], values[slots], qo_indptr, kv_indptr, scale)


def true_decode_padded(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, table: Tensor, seq_lens: Tensor, scale: float, rank: int = 0
) -> Tensor:
    v_cache = k_cache[..., :rank] if v_cache is None else v_cache
    out = torch.zeros(q.shape[0], q.shape[1], v_cache.shape[2], dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        slots = table[row, :length]
        for head in range(q.shape[1] if length else 0):
            out[row, head] = attend(q[row, head], k_cache[slots, head // group], v_cache[slots, head // group], scale)
    return out


def true_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, table: Tensor, rows: Tensor, seq_lens: Tensor, scale: float,
    rank: int = 0, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = true_decode_padded(q, k_cache, v_cache, table[rows], seq_lens, scale, rank)
    return out if gate is None else out / (1 + (-gate.double()).exp())


def true_mla_decode_project(
    q: Tensor, cache: Tensor, table: Tensor, rows: Tensor, seq_lens: Tensor, w_vc: Tensor, scale: float
) -> Tensor:
    context = true_decode_attention(q, cache.unsqueeze(1), None, table, rows, seq_lens, scale, w_vc.shape[1])
    return torch.stack([context[:, head] @ w_vc[head].double() for head in range(len(w_vc))], dim=1).flatten(1)


def of_several(truth: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    """``truth`` of single queries, of those of each request's last tokens.

    first: where that stands which requests have one of each, before their lengths.
    """

    def several(q: Tensor, *args: object) -> Tensor:
        rows, lens = args[first - 1 : first + 1]
        assert isinstance(rows, Tensor) and isinstance(lens, Tensor)
        width = len(q) // max(1, len(lens))
        by_query = [lens - width + 1 + number for number in range(width)]
        counted = torch.stack(by_query, dim=1).flatten() if by_query else lens
        return truth(q, *args[: first - 1], rows.repeat_interleave(max(1, width), 0), counted, *args[first + 1 :])

    return several


ATTENTION_TRUTHS: dict[str, Callable[..., Tensor]] = {
    "attention.extend_ragged": true_extend_ragged,
    "attention.extend_attention": true_extend_attention,
    "attention.decode_padded": of_several(true_decode_padded, 3),
    "attention.decode_attention": of_several(true_decode_attention, 4),
    "attention.mla_decode_project": true_mla_decode_project,
}
