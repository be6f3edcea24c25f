"""Sparse attention over 8-bit rows in two passes, for steps whose programs fill the device without sharing rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_dtype
from sglang.kernels.ops.attention.packed_rows import GROUP
from sglang.kernels.ops.attention.sparse_splits import Pass, Passes

# Groups of columns of a row, of which the last is bfloat16; a place has a byte for the scale of each.
NUM_GROUPS = 8
# Most bytes stored between the two passes: longer steps run both passes part by part.
MAX_BETWEEN = 128 << 20


def attend_in_passes(
    q: Tensor, window: Tensor, window_rows: Tensor, sinks: Tensor, scale: float, window_scales: Tensor,
    entries: Tensor | None, entry_scales: Tensor | None, chosen: Tensor | None, page_table: Tensor | None,
    requests: Tensor | None, visible: Tensor | None, per_page: int, passes: Passes, packed: bool,
) -> Tensor:  # fmt: skip
    """As ``sparse_attention``, for what ``fits_passes``; ``packed``: numbers are made by instructions of sm_90."""
    from sglang.kernels.ops.attention.sparse_passes_triton import block_logits_kernel, block_values_kernel

    num_rows, heads, dim = q.shape
    out = torch.empty(num_rows, heads, dim, dtype=q.dtype, device=q.device)
    num_window, num_entries = window_rows.shape[1], 0
    if page_table is not None:
        num_entries = page_table.shape[1] * per_page if chosen is None else chosen.shape[1]
    first, second = passes.logits, passes.values
    blocks = cdiv(num_window, first.block) + cdiv(num_entries, first.block)
    slots = blocks * first.block
    # Parts of one size, so that none is a small one.
    parts = max(1, cdiv(num_rows * slots * (2 * heads + 16), MAX_BETWEEN))
    step = cdiv(num_rows, parts)
    weights = torch.empty(step, heads, slots, dtype=torch.float16, device=q.device)
    places, exponents = (torch.empty(step, slots, dtype=torch.int64, device=q.device) for _ in range(2))
    most, total = (torch.empty(step, blocks, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    if entries is None or entry_scales is None:
        entries, entry_scales = window, window_scales
    none = window_rows
    shape = {"PLAIN": 2 * dim - window.shape[2], "DTYPE": triton_dtype(window.dtype), "SM90": packed}
    for start in range(0, num_rows, step):
        part, count = slice(start, start + step), min(step, num_rows - start)
        block_logits_kernel[(count * cdiv(heads, first.heads), blocks)](
            q[part], window, window_scales, window_rows[part], entries, entry_scales,
            none if chosen is None else chosen[part], none if page_table is None else page_table,
            none if requests is None else requests[part], none if visible is None else visible[part],
            weights, places, exponents, most, total, scale, heads, num_window, num_entries,
            q.stride(0), q.stride(1), window.stride(0), window_scales.stride(0), window_rows.stride(0),
            entries.stride(0), entry_scales.stride(0), 0 if chosen is None else chosen.stride(0),
            0 if page_table is None else page_table.stride(0),
            WIDTH=window.shape[2], WINDOW_PAGE=window.shape[1], ENTRY_PAGE=per_page, CHOSEN=chosen is not None,
            BLOCK_H=first.heads, BLOCK_N=first.block, **shape, **_launch(first),
        )  # fmt: skip
        block_values_kernel[(count * cdiv(heads, second.heads) * (dim // second.columns),)](
            window, entries, sinks, weights, places, exponents, most, total, out[part], heads, num_window, blocks,
            DIM=dim, BLOCK_H=second.heads, BLOCK_N=first.block, BLOCK_C=second.columns, ROWS=second.block,
            BLOCKS=max(2, next_power_of_2(blocks)), **shape, **_launch(second),
        )  # fmt: skip
    return out


def fits_passes(q: Tensor, window: Tensor, window_scales: Tensor | None, entries: Tensor | None) -> bool:
    """Whether the passes read the caches: bfloat16 queries, and rows of eight groups of which the last is bfloat16."""
    if q.dtype != torch.bfloat16 or q.shape[2] != NUM_GROUPS * GROUP or window_scales is None:
        return False
    caches = [window] if entries is None else [window, entries]
    whole = all(cache.shape[2] == (NUM_GROUPS + 1) * GROUP and cache.stride(0) % 16 == 0 for cache in caches)
    return whole and window_scales.shape[2] == NUM_GROUPS


def _launch(of: Pass) -> dict[str, int]:
    return {"num_warps": of.num_warps, "num_stages": of.num_stages}
