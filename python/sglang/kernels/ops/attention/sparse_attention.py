"""Attention of each row over rows of its own: a window and compressed entries, in one softmax with a sink."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.kernels.ops.attention.compress import GATHER_BYTES
from sglang.kernels.ops.attention.packed_rows import load_rows, make_pages, store_rows_torch
from sglang.kernels.spec import Case, Impl, Op


def sparse_attention_torch(
    q: torch.Tensor,
    window: torch.Tensor,
    window_rows: torch.Tensor,
    entries: torch.Tensor | None,
    entry_rows: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
    window_scales: torch.Tensor | None = None,
    entry_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention where a stored row is the key and the value of all heads.

    q [N, H, D]; window [S, D] with window_rows [N, W], entries [E, D] with entry_rows [N, K], or None for both: rows of
    the caches, int32 or int64, -1 for none, which is never read; caches with scales are as ``store_rows_torch`` has
    them. One softmax goes over both, in float32; exp(sinks), sinks [H] float32, adds to its denominator alone, so a row
    that sees nothing gets 0. -> [N, H, D] in q's dtype. DeepSeek-V4 report, section 2.3.3.
    """
    scopes = [(window, window_scales, window_rows)]
    if entries is not None and entry_rows is not None:
        scopes.append((entries, entry_scales, entry_rows))
    out = torch.empty_like(q)
    columns = sum(rows.shape[1] for *_, rows in scopes)
    step = max(1, GATHER_BYTES // (4 * columns * (q.shape[1] + q.shape[2])))
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        gathered = [_gather(cache, scales, ids[part], q.shape[2]) for cache, scales, ids in scopes]
        rows = torch.cat(gathered, dim=1)
        there = torch.cat([ids[part] >= 0 for *_, ids in scopes], dim=1).unsqueeze(1)
        scores = torch.einsum("nhd,nkd->nhk", q[part].float(), rows) * scale
        scores = scores.masked_fill(~there, -torch.inf)
        sink = sinks.float()[:, None].expand(scores.shape[0], -1, 1)
        weights = torch.cat((scores, sink), dim=2).softmax(dim=2)[..., :-1]
        out[part] = torch.einsum("nhk,nkd->nhd", weights, rows).to(q.dtype)
    return out


def _gather(cache: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """[N, K, dim] float32, 0 where a row is -1."""
    found = load_rows(cache, scales, rows.clamp(min=0).flatten(), dim).view(*rows.shape, dim)
    return torch.where((rows >= 0).unsqueeze(2), found, 0.0)


def _packed(rows: torch.Tensor, per_page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [S, D] in pages of 8-bit rows, the last four columns bfloat16."""
    pages = make_pages(rows.shape[0] // per_page, per_page, rows.shape[1], 4, torch.float8_e4m3fn)
    store_rows_torch(rows, torch.arange(rows.shape[0]), *pages)
    return pages


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def rows_of(num_rows: int, count: int) -> torch.Tensor:
        rows = torch.randint(1, 20, (num_rows, count), generator=generator, dtype=torch.int32)
        holes = torch.rand(num_rows, count, generator=generator) < 0.3
        holes[1:2] = True
        return rows.masked_fill(holes, -1)

    # By name: rows, heads, rows of the window, entries, sink.
    shapes = {
        "both": (6, 3, 8, 5, 0.3),
        "window": (5, 2, 7, None, -2.0),
        "one": (1, 1, 1, 1, 0.0),
        "sink": (4, 2, 8, 3, 60.0),
        "no-entries": (3, 2, 4, 0, 0.0),
        "empty": (0, 2, 4, 3, 0.0),
    }
    for name, (num_rows, heads, num_window, num_entries, sink) in shapes.items():
        q = torch.randn(num_rows, heads, 12, generator=generator)
        caches = [torch.randn(20, 12, generator=generator) for _ in range(2)]
        for cache in caches:
            cache[0] = torch.nan
        sinks = sink + torch.randn(heads, generator=generator)
        entries = (None, None) if num_entries is None else (caches[1], rows_of(num_rows, num_entries))
        args = (q, caches[0], rows_of(num_rows, num_window), *entries, sinks, 12**-0.5)
        yield Case(name, args)
        if name == "both":
            coarse = [cache.to(torch.float8_e4m3fn) for cache in caches]
            yield Case("both-8-bits", (q, coarse[0], args[2], coarse[1], args[4], sinks, args[6]))
            packed, scales = zip(*(_packed(cache, per_page) for cache, per_page in zip(caches, (4, 2), strict=True)))
            yield Case("both-packed", (q, packed[0], args[2], packed[1], args[4], sinks, args[6], *scales))


sparse_attention = Op("compressed.sparse_attention", Impl("torch", sparse_attention_torch), cases=_cases)
