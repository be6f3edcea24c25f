"""One query per request, or several, over padded rows of slots: keys and values, or latent rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.spec import Impl, Op

# Bytes of gathered rows at once: what a core's cache holds, so that rows are read from memory once.
CHUNK_BYTES = 2 << 20


def readable_slots(slot_table: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slots that are safe to read, and the mask of columns past each row's length (None when there are none).

    slot_table [B, L] int64, seq_lens [B] int64. A column past the end reads the row's first slot instead, since a
    stale or unwritten slot may hold NaN, which a zero probability does not remove; an empty row reads slot 0.
    """
    beyond = torch.arange(slot_table.shape[1], device=slot_table.device) >= seq_lens.unsqueeze(1)
    if slot_table.device.type == "cpu" and not bool(beyond.any()):
        return slot_table, None
    first = slot_table[:, :1].masked_fill(seq_lens.unsqueeze(1) == 0, 0)
    return torch.where(beyond, first, slot_table), beyond


def queries_per_request(q: Tensor, seq_lens: Tensor) -> int:
    """How many rows of q [B * W, ...] each request has: W, and 1 of no requests."""
    return max(1, q.shape[0] // max(1, seq_lens.shape[0]))


def last_lengths(seq_lens: Tensor, width: int) -> Tensor:
    """Tokens up to each of the last ``width`` ones of a request: [B, W]."""
    return seq_lens.unsqueeze(1) + torch.arange(1 - width, 1, device=seq_lens.device)


def later_columns(slot_table: Tensor, seq_lens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Columns after the token of each query, [B, Hk * W * G, L] bool: of W queries of Hk groups of G heads."""
    kv_heads, width, group = shape
    columns = torch.arange(slot_table.shape[1], device=seq_lens.device)
    beyond = columns >= last_lengths(seq_lens, width).unsqueeze(2)
    return beyond.view(-1, 1, width, 1, len(columns)).expand(-1, kv_heads, -1, group, -1).flatten(1, 3)


def ends_finite(cache: Tensor, slot_table: Tensor, seq_lens: Tensor, width: int) -> bool:
    """Whether the cache rows of the last ``width`` tokens of requests, which not all of their queries see, hold neither
    NaN nor infinities: a probability of 0 does not remove these. False as well for a sum that is too large."""
    slots = slot_table.gather(1, last_lengths(seq_lens, width) - 1)
    return bool(read_rows(cache, slots.flatten(), torch.float32).sum().isfinite())


def decode_padded_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, slot_table: Tensor, seq_lens: Tensor, scale: float,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """Softmax attention of the queries of each request's last W tokens over its slots, each up to its own token.

    q [B*W, Hq, D], packed by request, k_cache [S, Hk, D], v_cache [S, Hk, Dv], slot_table [B, L] int64 (entries past a
    row's length are never used), seq_lens [B] int64 in [W, L], for W = 1 in [0, L] -> [B*W, Hq, Dv] in q's dtype,
    computed in float32; a row of length 0 gives zeros. What a later token left in the cache, NaN included, changes no
    query before it. v_cache None and ``rank``: as in ``attention.extend_attention``.
    """
    width, batch, (kv_heads, dim) = queries_per_request(q, seq_lens), seq_lens.shape[0], k_cache.shape[1:]
    v_dim = rank if v_cache is None else v_cache.shape[2]
    if batch == 0 or slot_table.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v_dim)
    slots, beyond = readable_slots(slot_table, seq_lens)
    if width == 1:
        hidden = None if beyond is None else beyond.unsqueeze(1)
        out = _attend(q, k_cache, v_cache, slots, hidden, v_dim, scale)
        return out if beyond is None else out.masked_fill_((seq_lens == 0).view(-1, 1, 1), 0.0)
    if not ends_finite(k_cache if v_cache is None else v_cache, slot_table, seq_lens, width):
        slots, lengths = slot_table.repeat_interleave(width, 0), last_lengths(seq_lens, width).flatten()
        return decode_padded_torch(q, k_cache, v_cache, slots, lengths, scale, rank)
    # The queries of a request as more heads, those of a key head side by side.
    hidden = later_columns(slot_table, seq_lens, (kv_heads, width, q.shape[1] // kv_heads))
    heads = q.reshape(batch, width, kv_heads, -1, dim).transpose(1, 2).reshape(batch, -1, dim)
    out = _attend(heads, k_cache, v_cache, slots, hidden, v_dim, scale)
    return out.view(batch, kv_heads, width, -1, v_dim).transpose(1, 2).reshape(*q.shape[:2], -1)


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, hidden: Tensor | None, v_dim: int, scale: float
) -> Tensor:
    """q [B, Hq, D] over slots [B, L] except the columns that are ``hidden`` [B, 1 or Hq, L] -> [B, Hq, Dv]."""
    (batch, heads, _), length, kv_heads = q.shape, slots.shape[1], k_cache.shape[1]
    out = q.new_empty(batch, heads, v_dim)
    # Rows by (request, key head): each head's keys come out contiguous, so one batched product does all heads.
    head_ids = torch.arange(kv_heads, device=q.device).view(1, kv_heads, 1)
    rows = slots.unsqueeze(1) * kv_heads + head_ids
    keys, values = k_cache.flatten(0, 1), None if v_cache is None else v_cache.flatten(0, 1)
    group = heads // kv_heads
    queries = q.float().reshape(batch * kv_heads, group, -1) * scale
    token_bytes = keys.shape[1] * keys.itemsize + (0 if values is None else v_dim * values.itemsize)
    step = max(1, CHUNK_BYTES // (kv_heads * length * token_bytes))
    for start in range(0, batch, step):
        part = rows[start : start + step]
        count = part.shape[0]
        flat = part.reshape(-1)
        key = read_rows(keys, flat, torch.float32).view(count * kv_heads, length, -1)
        value = key[..., :v_dim]
        if values is not None:
            value = read_rows(values, flat, torch.float32).view(count * kv_heads, length, -1)
        logits = torch.bmm(queries[start * kv_heads : (start + count) * kv_heads], key.mT)
        logits = logits.view(count, heads, length)
        if hidden is not None:
            logits = logits.masked_fill(hidden[start : start + count], float("-inf"))
        probs = logits.softmax(-1).view(count * kv_heads, group, length)
        out[start : start + count] = torch.bmm(probs, value).view(count, heads, v_dim)
    return out


decode_padded = Op("attention.decode_padded", Impl("torch", decode_padded_torch))
