"""Causal attention of packed requests over packed keys and values: prefill without a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.attention.launchers import launch_extend, rows_fit
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.spec import Impl, Op

# Query rows at once: small enough that a block skips most of the keys after it, large enough to fill a product.
BLOCK_ROWS = 512
# Bound on the logits mask of one block, in elements.
_BLOCK_MASK = 1 << 21


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of one request whose n queries are the last n of its m tokens.

    q [n, Hq, D], k [m, Hk, D], v [m, Hk, Dv], n <= m, Hq a multiple of Hk -> [n, Hq, Dv] in q's dtype. Query i sees
    keys up to m - n + i.
    """
    num_queries, num_keys, v_dim = q.shape[0], k.shape[0], v.shape[2]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    if v_dim < k.shape[2]:  # the fused kernel of torch wants one width
        value = F.pad(value, (0, k.shape[2] - v_dim))
    gqa, overflow = q.shape[1] != k.shape[1], logits_may_overflow(q, k)
    block = max(16, min(BLOCK_ROWS, _BLOCK_MASK // max(num_keys, 1)))
    parts = []
    for start in range(0, num_queries, block):
        end = min(start + block, num_queries)
        seen, rows = num_keys - num_queries + end, end - start
        if overflow:
            part = _attend_plainly(query[0, :, start:end], key[0, :, :seen], value[0, :, :seen], scale)
            parts.append(part[..., :v_dim].transpose(0, 1).to(q.dtype))
            continue
        mask = None
        if rows > 1 and rows != seen:
            mask = torch.ones(rows, seen, dtype=torch.bool, device=q.device).tril(seen - rows)
        part = F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], attn_mask=mask,
            is_causal=rows == seen and rows > 1, scale=scale, enable_gqa=gqa,
        )  # fmt: skip
        parts.append(part[0, ..., :v_dim].transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def logits_may_overflow(q: Tensor, k: Tensor) -> bool:
    """Whether rows of q [n, Hq, D] and k [m, Hk, D] may have a product that is no finite float32, or hold NaN."""
    largest = [max(abs(float(end)) for end in part.aminmax()) for part in (q, k)]
    return not largest[0] * largest[1] * q.shape[2] < torch.finfo(torch.float32).max


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of q [Hq, n, D], the last n of m tokens, over k [Hk, m, D] and v [Hk, m, Dv], by the formula, in float32: torch's
    fused kernel gives numbers on a CPU where no logit is finite."""
    key, value = (part.float().repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
    logits = q.float() @ key.mT * scale
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def join_tail(k: Tensor, k_tail: Tensor | None) -> Tensor:
    """Whole keys [M, H, D] of k [M, H, D - P] and k_tail [M, P], which all heads share; k itself without a tail."""
    return k if k_tail is None else torch.cat((k, k_tail.unsqueeze(1).expand(-1, k.shape[1], -1)), dim=-1)


def extend_ragged_torch(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, scale: float, k_tail: Tensor | None = None
) -> Tensor:
    """Causal softmax attention, request by request, over packed rows.

    q [N, Hq, D], k [M, Hk, D], v [M, Hk, Dv]; request i owns query rows qo_indptr[i]:qo_indptr[i+1] and key rows
    kv_indptr[i]:kv_indptr[i+1] (int64 [B+1]); its queries are its last tokens, at most as many as its keys, and zeros
    come of those without keys. With k_tail [M, P] all heads share the last P columns of the keys, and k is
    [M, Hk, D - P]. -> [N, Hq, Dv] in q's dtype.
    """
    k = join_tail(k, k_tail)
    queries, keys = qo_indptr.tolist(), kv_indptr.tolist()
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for i in range(len(queries) - 1):
        rows = slice(queries[i], queries[i + 1])
        cols = slice(keys[i], keys[i + 1])
        if cols.stop == cols.start:
            out[rows] = 0
        elif rows.stop > rows.start:
            out[rows] = causal_attention(q[rows], k[cols], v[cols], scale)
    return out


def extend_ragged_triton(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, scale: float, k_tail: Tensor | None = None
) -> Tensor:
    shape = RowShape.of(q.shape[2], v.shape[2], k_tail=k_tail)
    return launch_extend(q, k, v, None, qo_indptr, kv_indptr, scale, shape, k_tail=k_tail)[0]


def _accepts(
    q: Tensor, k: Tensor, v: Tensor, qo: Tensor, kv: Tensor, scale: float,
    k_tail: Tensor | None = None,
) -> bool:  # fmt: skip
    return rows_fit(q, k, v, k_tail)


extend_ragged = Op(
    "attention.extend_ragged", triton_impl(extend_ragged_triton, _accepts), Impl("torch", extend_ragged_torch)
)
