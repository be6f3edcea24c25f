"""The entries of compressed attention that a row attends to, by the scores of the indexer."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.attention.compress import GATHER_BYTES
from sglang.kernels.ops.attention.packed_rows import is_packed, load_rows
from sglang.kernels.spec import Impl, Op

# Bytes of scores at once, whatever the context: rows are served in parts. Programs that score one part. Heads and
# columns that a program holds.
SCORE_BYTES = 64 << 20
SCORE_PROGRAMS = 2048
MAX_SIDE = 128


def select_entries_torch(
    q: Tensor, weights: Tensor, keys: Tensor, page_table: Tensor, requests: Tensor, visible: Tensor, per_page: int,
    top_k: int, key_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The ``top_k`` entries of the highest score that each row sees, all where it sees no more.

    The score of entry e is the sum over heads of ``weights * relu(q . key_e)``, in float32; of equal scores the lowest
    entry is taken. q [N, H, D], weights [N, H], keys [E, D]; entry e of request b has row
    ``page_table[b, e // per_page] * per_page + e % per_page`` of keys, page_table [B, P] int32; requests [N] int64 are
    the rows' requests, visible [N] int32: a row sees the entries below it. Keys with scales are as ``store_rows_torch``
    has them. -> ascending entry numbers [N, min(top_k, P * per_page)] int32, -1 after the last. DeepSeek-V4 report,
    section 2.3.1.
    """
    num_entries = page_table.shape[1] * per_page
    entries = torch.arange(num_entries, device=q.device)
    if num_entries <= top_k:
        return torch.where(entries < visible.unsqueeze(1), entries, -1).to(torch.int32)
    chosen = torch.empty(q.shape[0], top_k, dtype=torch.int32, device=q.device)
    step = max(1, GATHER_BYTES // (4 * num_entries * (q.shape[1] + q.shape[2])))
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        seen = entries < visible[part].unsqueeze(1)
        pages = page_table[requests[part]].long()
        rows = (pages.unsqueeze(2) * per_page + entries[:per_page]).flatten(1)
        found = load_rows(keys, key_scales, rows.flatten(), q.shape[2]).view(*rows.shape, q.shape[2])
        per_head = torch.einsum("nhd,ned->nhe", q[part].float(), found).relu()
        scores = torch.einsum("nh,nhe->ne", weights[part].float(), per_head).masked_fill(~seen, -torch.inf)
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        unseen = best >= visible[part].unsqueeze(1)
        ascending = best.masked_fill(unseen, num_entries).sort(dim=1).values
        chosen[part] = ascending.masked_fill(ascending == num_entries, -1).to(torch.int32)
    return chosen


def select_entries_triton(
    q: Tensor, weights: Tensor, keys: Tensor, page_table: Tensor, requests: Tensor, visible: Tensor, per_page: int,
    top_k: int, key_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from sglang.kernels.ops.attention.select_entries_triton import pick_entries_kernel, score_entries_kernel

    num_rows, heads, dim = q.shape
    num_entries = page_table.shape[1] * per_page
    width = min(top_k, num_entries)
    chosen = torch.empty(num_rows, width, dtype=torch.int32, device=q.device)
    # Where all entries fit, no row needs a score.
    columns = num_entries if num_entries > top_k else 0
    step = min(num_rows, max(1, SCORE_BYTES // max(4 * columns, 1)))
    scores = torch.empty(max(step * columns, 1), dtype=torch.float32, device=q.device)
    block_n = 64 if q.dtype.itemsize == 2 else 16
    for first in range(0, num_rows, max(step, 1)):
        count = min(step, num_rows - first)
        if columns:
            programs = max(1, min(cdiv(num_entries, block_n), SCORE_PROGRAMS // count))
            score_entries_kernel[(count, programs)](
                q, weights, keys, keys if key_scales is None else key_scales, page_table, requests, visible, scores,
                first, columns, q.stride(0), q.stride(1), weights.stride(0), keys.stride(0),
                0 if key_scales is None else key_scales.stride(0), page_table.stride(0),
                HEADS=heads, DIM=dim, BLOCK_H=max(16, next_power_of_2(heads)), BLOCK_D=max(16, next_power_of_2(dim)),
                BLOCK_N=block_n, PER_PAGE=per_page, TOP_K=top_k, HAS_SCALES=key_scales is not None,
                num_warps=4, num_stages=2,
            )  # fmt: skip
        if width:
            pick_entries_kernel[(count,)](
                scores, visible, chosen, first, columns, chosen.stride(0),
                TOP_K=top_k, WIDTH=width, BLOCK=min(2048, max(256, next_power_of_2(columns))),
                BLOCK_K=next_power_of_2(min(width, 1024)), num_warps=4,
            )  # fmt: skip
    return chosen


def _accepts(
    q: Tensor, weights: Tensor, keys: Tensor, page_table: Tensor, requests: Tensor, visible: Tensor, per_page: int,
    top_k: int, key_scales: Tensor | None = None,
) -> bool:  # fmt: skip
    dense = all(x.stride(-1) == 1 for x in (q, weights, page_table)) and max(q.shape[1:]) <= MAX_SIDE
    same_page = key_scales is None or (keys.shape[1] == per_page and key_scales.dtype == torch.float32)
    return dense and same_page and top_k > 0 and is_packed(keys, key_scales, q.dtype)


select_entries = Op(
    "compressed.select_entries", triton_impl(select_entries_triton, _accepts), Impl("torch", select_entries_torch)
)
