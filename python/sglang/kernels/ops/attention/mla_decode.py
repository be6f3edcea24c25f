"""One query a request over the paged latent cache: absorbed latent attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.decode_padded import CHUNK_BYTES, decode_tables, readable_slots
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

    q [B, H, R+P] (query times W_UK, then the rotated part), latent_cache [S, R+P], slot_table [B, L] int64 (entries
    past a row's length are never used), seq_lens [B] int64 in [0, L] -> [B, H, R] in q's dtype, computed in
    float32; a row of length 0 gives zeros. DeepSeek-V2 report, section 2.1 and appendix C.
    """
    batch, heads, _ = q.shape
    out = q.new_zeros(batch, heads, kv_lora_rank)
    length = slot_table.shape[1]
    if batch == 0 or length == 0:
        return out
    slots, beyond = readable_slots(slot_table, seq_lens)
    queries = q.float() * scale
    step = max(1, CHUNK_BYTES // (length * latent_cache.shape[1] * latent_cache.itemsize))
    for start in range(0, batch, step):
        part = slots[start : start + step]
        rows = read_rows(latent_cache, part.reshape(-1), torch.float32).view(part.shape[0], length, -1)
        logits = torch.bmm(queries[start : start + step], rows.mT)
        if beyond is not None:
            logits = logits.masked_fill(beyond[start : start + step].unsqueeze(1), float("-inf"))
        probs = logits.softmax(-1)
        out[start : start + step] = torch.bmm(probs, rows[..., :kv_lora_rank])
    return out if beyond is None else out.masked_fill_((seq_lens == 0).view(-1, 1, 1), 0.0)


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for name, table, lens, total in decode_tables():
        q = torch.randn(len(lens), 3, 20, generator=generator)
        cache = torch.randn(total, 20, generator=generator)
        cache[-1] = float("nan")
        yield Case(name, (q, cache, table, lens, 16, 0.2))


mla_decode = Op("attention.mla_decode", Impl("torch", mla_decode_torch), cases=_cases)
