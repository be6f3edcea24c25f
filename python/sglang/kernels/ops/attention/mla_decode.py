"""One query per request, or several, over the paged latent cache: absorbed latent attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.decode_padded import (
    CHUNK_BYTES,
    decode_tables,
    ends_finite,
    last_lengths,
    last_token_tables,
    later_columns,
    queries_per_request,
    readable_slots,
    spoil_ends,
)
from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.spec import Case, Impl, Op


def mla_decode_torch(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    slot_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """Softmax attention where all heads share one key row per token, whose first R columns are the value.

    q [B*W, H, R+P] (query times W_UK, then the rotated part) of each request's last W tokens, each of which sees those
    up to its own, latent_cache [S, R+P], slot_table [B, L] int64 (entries past a row's length are never used), seq_lens
    [B] int64 in [W, L], for W = 1 in [0, L] -> [B*W, H, R] in q's dtype, computed in float32; a row of length 0 gives
    zeros. What a later token left in the cache, NaN included, changes no query before it. DeepSeek-V2 report, section
    2.1 and appendix C.
    """
    width, batch = queries_per_request(q, seq_lens), seq_lens.shape[0]
    if batch == 0 or slot_table.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], kv_lora_rank)
    slots, beyond = readable_slots(slot_table, seq_lens)
    if width == 1:
        hidden = None if beyond is None else beyond.unsqueeze(1)
        out = _attend(q, latent_cache, slots, hidden, kv_lora_rank, scale)
        return out if beyond is None else out.masked_fill_((seq_lens == 0).view(-1, 1, 1), 0.0)
    if not ends_finite(latent_cache, slot_table, seq_lens, width):
        slots, lengths = slot_table.repeat_interleave(width, 0), last_lengths(seq_lens, width).flatten()
        return mla_decode_torch(q, latent_cache, slots, lengths, kv_lora_rank, scale)
    # The queries of a request as more heads.
    hidden = later_columns(slot_table, seq_lens, (1, width, q.shape[1]))
    out = _attend(q.reshape(batch, -1, q.shape[2]), latent_cache, slots, hidden, kv_lora_rank, scale)
    return out.view(*q.shape[:2], -1)


def _attend(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    slots: torch.Tensor,
    hidden: torch.Tensor | None,
    kv_lora_rank: int,
    scale: float,
) -> torch.Tensor:
    """q [B, H, R+P] over slots [B, L] except the columns that are ``hidden`` [B, 1 or H, L] -> [B, H, R]."""
    (batch, heads, _), length = q.shape, slots.shape[1]
    out = q.new_empty(batch, heads, kv_lora_rank)
    queries = q.float() * scale
    step = max(1, CHUNK_BYTES // (length * latent_cache.shape[1] * latent_cache.itemsize))
    for start in range(0, batch, step):
        part = slots[start : start + step]
        rows = read_rows(latent_cache, part.reshape(-1), torch.float32).view(part.shape[0], length, -1)
        logits = torch.bmm(queries[start : start + step], rows.mT)
        if hidden is not None:
            logits = logits.masked_fill(hidden[start : start + step], float("-inf"))
        probs = logits.softmax(-1)
        out[start : start + step] = torch.bmm(probs, rows[..., :kv_lora_rank])
    return out


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, table, lens, total in decode_tables():
        q = torch.randn(len(lens), 3, 20, generator=generator)
        cache = torch.randn(total, 20, generator=generator)
        cache[-1] = float("nan")
        yield Case(name, (q, cache, table, lens, 16, 0.2))
    for name, width, table, lens, total in last_token_tables():
        q = torch.randn(len(lens) * width, 3, 20, generator=generator)
        cache = torch.randn(total, 20, generator=generator)
        cache[-1] = float("nan")
        for suffix, rows in (("", cache), ("-nan", spoil_ends(cache, table, lens))):
            yield Case(f"{name}-{width}-queries{suffix}", (q, rows, table, lens, 16, 0.2))


mla_decode = Op("attention.mla_decode", Impl("torch", mla_decode_torch), cases=_cases)
