"""Attention of each row over rows of its own: a window and compressed entries, in one softmax with a sink."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.attention.compress import GATHER_BYTES
from sglang.kernels.ops.attention.launchers import merge_parts
from sglang.kernels.ops.attention.packed_rows import GROUP, is_packed, load_rows
from sglang.kernels.ops.attention.sparse_passes import attend_in_passes, fits_passes
from sglang.kernels.ops.attention.sparse_splits import SparseTile, choose_passes, sparse_tile, split_count
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

# Where 8-bit floats become bfloat16 by instructions on two at once.
PACKED_ARCHS = ("sm_90",)
# Widest rows that the kernel holds.
MAX_DIM = 512


def sparse_attention_torch(
    q: Tensor, window: Tensor, window_rows: Tensor, sinks: Tensor, scale: float, window_scales: Tensor | None = None,
    entries: Tensor | None = None, entry_scales: Tensor | None = None, chosen: Tensor | None = None,
    page_table: Tensor | None = None, requests: Tensor | None = None, visible: Tensor | None = None, per_page: int = 1,
) -> Tensor:  # fmt: skip
    """Softmax attention where a stored row is the key and the value of all heads.

    q [N, H, D]; window [S, D] with window_rows [N, W] int32, rows of it. entries [E, D], or None for all that follows:
    entry e of request b has row ``page_table[b, e // per_page] * per_page + e % per_page`` of it, page_table [B, P]
    int32; requests [N] int64 are the rows' requests. visible [N] int32: a row attends to the entries below it, or with
    chosen [N, K] int32 to those that its first ``visible`` places name. -1 is none; what is not attended to is never
    read. Caches with scales are as ``store_rows_torch`` has them. One softmax goes over both, in float32; exp(sinks),
    sinks [H] float32, adds to its denominator alone, so a row that sees nothing gets 0. -> [N, H, D] in q's dtype.
    DeepSeek-V4 report, section 2.3.3.
    """
    out = torch.empty_like(q)
    scopes = [(window, window_scales, window_rows.shape[1])]
    placed = None
    if entries is not None:
        assert page_table is not None and requests is not None and visible is not None
        placed = page_table, requests, visible
        num_entries = page_table.shape[1] * per_page if chosen is None else chosen.shape[1]
        scopes.append((entries, entry_scales, num_entries))
    step = max(1, GATHER_BYTES // (4 * sum(columns for *_, columns in scopes) * (q.shape[1] + q.shape[2])))
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        ids = [window_rows[part].long()]
        if placed is not None:
            table, of_rows, seen = placed
            of_part = None if chosen is None else chosen[part]
            ids.append(_entry_rows(table, of_rows[part], seen[part], of_part, num_entries, per_page))
        gathered = [_gather(*scope[:2], of_scope, q.shape[2]) for scope, of_scope in zip(scopes, ids, strict=True)]
        rows, there = torch.cat(gathered, dim=1), (torch.cat(ids, dim=1) >= 0).unsqueeze(1)
        scores = torch.einsum("nhd,nkd->nhk", q[part].float(), rows) * scale
        scores = scores.masked_fill(~there, -torch.inf)
        sink = sinks.float()[:, None].expand(scores.shape[0], -1, 1)
        weights = torch.cat((scores, sink), dim=2).softmax(dim=2)[..., :-1]
        out[part] = torch.einsum("nhk,nkd->nhd", weights, rows).to(q.dtype)
    return out


def _entry_rows(
    page_table: Tensor, requests: Tensor, visible: Tensor, chosen: Tensor | None, count: int, per_page: int
) -> Tensor:
    """Cache rows [N, count] int64 of the entries that rows attend to, -1 for none."""
    places = torch.arange(count, device=visible.device)
    numbers = places.expand(visible.shape[0], -1) if chosen is None else chosen.long()
    there = (places < visible.unsqueeze(1)) & (numbers >= 0)
    numbers = numbers.clamp(min=0)
    pages = page_table[requests.unsqueeze(1), numbers // per_page].long()
    return torch.where(there, pages * per_page + numbers % per_page, -1)


def _gather(cache: Tensor, scales: Tensor | None, rows: Tensor, dim: int) -> Tensor:
    """[N, K, dim] float32, 0 where a row is -1."""
    found = load_rows(cache, scales, rows.clamp(min=0).flatten(), dim).view(*rows.shape, dim)
    return torch.where((rows >= 0).unsqueeze(2), found, 0.0)


def sparse_attention_triton(
    q: Tensor, window: Tensor, window_rows: Tensor, sinks: Tensor, scale: float, window_scales: Tensor | None = None,
    entries: Tensor | None = None, entry_scales: Tensor | None = None, chosen: Tensor | None = None,
    page_table: Tensor | None = None, requests: Tensor | None = None, visible: Tensor | None = None, per_page: int = 1,
    tile: SparseTile | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """``tile`` and ``splits`` are for tuning and for tests of their invariance; None takes the tables' choice."""
    from sglang.kernels.ops.attention.sparse_attention_triton import sparse_attention_kernel

    num_rows, heads, dim = q.shape
    out = torch.empty(num_rows, heads, dim, dtype=q.dtype, device=q.device)
    if not num_rows:
        return out
    num_window, num_entries = window_rows.shape[1], 0
    if page_table is not None:
        num_entries = page_table.shape[1] * per_page if chosen is None else chosen.shape[1]
    passes = choose_passes(num_rows, heads, num_window + num_entries) if tile is None and splits is None else None
    if passes is not None and window_scales is not None and fits_passes(q, window, window_scales, entries):
        return attend_in_passes(
            q, window, window_rows, sinks, scale, window_scales, entries, entry_scales, chosen, page_table, requests,
            visible, per_page, passes, packed=current_platform.arch in PACKED_ARCHS,
        )  # fmt: skip
    tile = tile or sparse_tile(num_rows, heads, q.dtype.itemsize)
    if splits is None:
        splits = split_count(num_rows, heads, num_window + num_entries, dim, tile)
    parts, lse = out, out
    if splits > 1:
        parts = torch.empty(num_rows, splits, heads, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, splits, heads, dtype=torch.float32, device=q.device)
    of_window, of_entries = _layout(window, window_scales), _layout(entries, entry_scales)
    none = window_rows
    sparse_attention_kernel[(num_rows * cdiv(heads, tile.heads), splits)](
        q, window, none if window_scales is None else window_scales, window_rows, sinks,
        none if entries is None else entries, none if entry_scales is None else entry_scales,
        none if chosen is None else chosen, none if page_table is None else page_table,
        none if requests is None else requests, none if visible is None else visible, parts, lse,
        scale, heads, splits, num_window, num_entries,
        q.stride(0), q.stride(1), *map(_stride, (window, window_scales, window_rows)),
        *map(_stride, (entries, entry_scales, chosen, page_table)),
        DIM=dim, BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_H=tile.heads, BLOCK_N=tile.block_n,
        WINDOW_PAGE=of_window[0], WINDOW_WIDTH=of_window[1], WINDOW_SCALES=of_window[2],
        ENTRY_PAGE=per_page, ENTRY_WIDTH=of_entries[1], ENTRY_SCALES=of_entries[2],
        HAS_ENTRIES=entries is not None, CHOSEN=chosen is not None, WHOLE=splits == 1,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **({"kpack": tile.kpack} if tile.kpack else {}),
    )  # fmt: skip
    return merge_parts(parts, lse, out.dtype) if splits > 1 else out


def _stride(x: Tensor | None) -> int:
    """Elements from one row to the next."""
    return 0 if x is None else x.stride(0)


def _layout(cache: Tensor | None, scales: Tensor | None) -> tuple[int, int, int]:
    """Rows of a page, bytes of a row and bytes of its scales; zeros after where rows are plain."""
    return (1, 0, 0) if cache is None or scales is None else (cache.shape[1], cache.shape[2], scales.shape[2])


def _accepts(
    q: Tensor, window: Tensor, window_rows: Tensor, sinks: Tensor, scale: float, window_scales: Tensor | None = None,
    entries: Tensor | None = None, entry_scales: Tensor | None = None, chosen: Tensor | None = None,
    page_table: Tensor | None = None, requests: Tensor | None = None, visible: Tensor | None = None, per_page: int = 1,
) -> bool:  # fmt: skip
    dim = q.shape[2]
    dense = all(rows.stride(1) == 1 for rows in (window_rows, chosen, page_table) if rows is not None)
    if not dense or q.stride(2) != 1 or dim > MAX_DIM or not _reads(window, window_scales, dim, q.dtype):
        return False
    same_page = entries is None or entry_scales is None or entries.shape[1] == per_page
    return same_page and (entries is None or _reads(entries, entry_scales, dim, q.dtype))


def _reads(cache: Tensor, scales: Tensor | None, dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads the cache: the columns that stay bfloat16 are in one group of 64."""
    plain = dim if scales is None else 2 * dim - cache.shape[2]
    return is_packed(cache, scales, dtype) and plain % GROUP + dim - plain <= GROUP


sparse_attention = Op(
    "compressed.sparse_attention", triton_impl(sparse_attention_triton, _accepts), Impl("torch", sparse_attention_torch)
)
