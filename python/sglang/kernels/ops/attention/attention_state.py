"""Attention over a part of the keys with the log of its sum of exponentials, and the merge of two such parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.attention.extend_ragged import join_tail
from sglang.kernels.ops.attention.launchers import launch_extend, rows_fit
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.spec import Impl, Op

State = tuple[Tensor, Tensor]


def extend_state_torch(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, scale: float, causal: bool,
    k_tail: Tensor | None = None,
) -> State:  # fmt: skip
    """Softmax attention over packed rows, request by request, and its log-sum-exp.

    q [N, Hq, D], k [M, Hk, D], v [M, Hk, Dv]; request i owns query rows qo_indptr[i]:qo_indptr[i+1] and key rows
    kv_indptr[i]:kv_indptr[i+1] (int64 [B+1]), possibly none. With ``causal`` its queries are its last tokens. k_tail
    as ``attention.extend_ragged`` takes it. -> out [N, Hq, Dv] in q's dtype and lse [N, Hq] float32, natural log of the
    sum of exp(scale * q.k); a row that sees no key has zeros and -inf.
    """
    k = join_tail(k, k_tail)
    queries, keys = qo_indptr.tolist(), kv_indptr.tolist()
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    for i in range(len(queries) - 1):
        rows, cols = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        count, seen = rows.stop - rows.start, cols.stop - cols.start
        if count == 0 or seen == 0:
            continue
        key, value = (tensor[cols].float().repeat_interleave(group, 1) for tensor in (k, v))
        logits = torch.einsum("nhd,mhd->hnm", q[rows].float() * scale, key)
        if causal:
            hidden = torch.ones(count, seen, dtype=torch.bool, device=q.device).triu(seen - count + 1)
            logits = logits.masked_fill(hidden, float("-inf"))
        lse[rows] = logits.logsumexp(-1).T
        out[rows] = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), value).to(q.dtype)
    return out, lse


def merge_states_torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> State:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    out_a, out_b [N, H, D], lse_a, lse_b [N, H] float32 -> out in out_a's dtype and lse. A part with lse -inf has no
    weight; where both have none, out is 0 and lse -inf. Sum of exponentials, split by set.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    floor = lse.masked_fill(lse == float("-inf"), 0.0)
    parts = [(lse_part - floor).exp().unsqueeze(-1) * out.float() for lse_part, out in ((lse_a, out_a), (lse_b, out_b))]
    return (parts[0] + parts[1]).to(out_a.dtype), lse


def extend_state_triton(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, scale: float, causal: bool,
    k_tail: Tensor | None = None,
) -> State:  # fmt: skip
    shape = RowShape.of(q.shape[2], v.shape[2], k_tail=k_tail)
    return launch_extend(q, k, v, None, qo_indptr, kv_indptr, scale, shape, causal, with_lse=True, k_tail=k_tail)


def merge_states_triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> State:
    from sglang.kernels.ops.attention.attention_state_triton import merge_states_kernel

    num_rows, heads, dim = out_a.shape
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    if num_rows:
        block_h = min(16, next_power_of_2(heads))
        merge_states_kernel[(num_rows, cdiv(heads, block_h))](
            out_a, lse_a, out_b, lse_b, out, lse,
            heads, BLOCK_H=block_h, DIM=dim, BLOCK_D=next_power_of_2(dim),
            num_warps=4,
        )  # fmt: skip
    return out, lse


def _accepts_extend(
    q: Tensor, k: Tensor, v: Tensor, qo: Tensor, kv: Tensor, scale: float, causal: bool,
    k_tail: Tensor | None = None,
) -> bool:  # fmt: skip
    return rows_fit(q, k, v, k_tail)


def _accepts_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> bool:
    dense = all(tensor.is_contiguous() for tensor in (out_a, lse_a, out_b, lse_b))
    return out_a.dtype == out_b.dtype and out_a.dtype in FLOATS and dense


extend_state = Op(
    "attention_state.extend", triton_impl(extend_state_triton, _accepts_extend), Impl("torch", extend_state_torch)
)
merge_states = Op(
    "attention_state.merge", triton_impl(merge_states_triton, _accepts_merge), Impl("torch", merge_states_torch)
)
