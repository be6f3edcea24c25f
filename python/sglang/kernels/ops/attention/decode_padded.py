"""One query a request over the paged cache of keys and values (multi-head or grouped-query)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.spec import Case, Impl, Op

# Bytes of gathered rows at once: what a core's cache holds, so that rows are read from memory once.
CHUNK_BYTES = 2 << 20


def readable_slots(slot_table: torch.Tensor, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots that are safe to read, and the mask of columns past each row's length (None when there are none).

    slot_table [B, L] int64, seq_lens [B] int64. A column past the end reads the row's first slot instead, since a
    stale or unwritten slot may hold NaN, which a zero probability does not remove; an empty row reads slot 0.
    """
    beyond = torch.arange(slot_table.shape[1], device=slot_table.device) >= seq_lens.unsqueeze(1)
    if slot_table.device.type == "cpu" and not bool(beyond.any()):
        return slot_table, None
    first = slot_table[:, :1].masked_fill(seq_lens.unsqueeze(1) == 0, 0)
    return torch.where(beyond, first, slot_table), beyond


def decode_padded_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each request's one query over its slots.

    q [B, Hq, D], k_cache [S, Hk, D], v_cache [S, Hk, Dv], slot_table [B, L] int64 (entries past a row's length are
    never used), seq_lens [B] int64 in [0, L] -> [B, Hq, Dv] in q's dtype, computed in float32; a row of length 0 gives
    zeros.
    """
    batch, heads, _ = q.shape
    kv_heads, v_dim = k_cache.shape[1], v_cache.shape[2]
    out = q.new_zeros(batch, heads, v_dim)
    length = slot_table.shape[1]
    if batch == 0 or length == 0:
        return out
    slots, beyond = readable_slots(slot_table, seq_lens)
    # Rows by (request, key head): each head's keys come out contiguous, so one batched product does all heads.
    head_ids = torch.arange(kv_heads, device=q.device).view(1, kv_heads, 1)
    rows = slots.unsqueeze(1) * kv_heads + head_ids
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    group = heads // kv_heads
    queries = q.float().reshape(batch * kv_heads, group, -1) * scale
    row_bytes = kv_heads * length * (keys.shape[1] * keys.itemsize + v_dim * values.itemsize)
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, batch, step):
        part = rows[start : start + step]
        count = part.shape[0]
        flat = part.reshape(-1)
        key = read_rows(keys, flat, torch.float32).view(count * kv_heads, length, -1)
        value = read_rows(values, flat, torch.float32).view(count * kv_heads, length, -1)
        logits = torch.bmm(queries[start * kv_heads : (start + count) * kv_heads], key.mT)
        logits = logits.view(count, heads, length)
        if beyond is not None:
            logits = logits.masked_fill(beyond[start : start + count].unsqueeze(1), float("-inf"))
        probs = logits.softmax(-1).view(count * kv_heads, group, length)
        out[start : start + count] = torch.bmm(probs, value).view(count, heads, v_dim)
    return out if beyond is None else out.masked_fill_((seq_lens == 0).view(-1, 1, 1), 0.0)


def decode_tables() -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int]]:
    """Name, slot table, lengths and number of slots of the batches that decode kernels must get right."""
    generator = torch.Generator().manual_seed(5)
    lengths = {"one-row": [1], "equal": [6, 6], "ragged": [1, 9, 4, 17], "with-empty": [3, 0, 5], "empty": []}
    for name, lens in lengths.items():
        longest = max(lens, default=0)
        total = sum(lens) + 2
        order = torch.randperm(total - 2, generator=generator) + 1
        table = torch.full((len(lens), longest), total - 1)  # the last slot is poison
        start = 0
        for row, length in enumerate(lens):
            table[row, :length] = order[start : start + length]
            start += length
        yield name, table, torch.tensor(lens, dtype=torch.int64), total


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, table, lens, total in decode_tables():
        for heads, kv_heads, dim in ((2, 2, 8), (6, 2, 8), (4, 1, 16)):
            q = torch.randn(len(lens), heads, dim, generator=generator)
            k_cache = torch.randn(total, kv_heads, dim, generator=generator)
            v_cache = torch.randn(total, kv_heads, dim, generator=generator)
            k_cache[-1], v_cache[-1] = float("nan"), float("nan")
            yield Case(f"{name}-{heads}x{kv_heads}", (q, k_cache, v_cache, table, lens, 0.3))


decode_padded = Op("attention.decode_padded", Impl("torch", decode_padded_torch), cases=_cases)
