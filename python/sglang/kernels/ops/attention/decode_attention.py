"""The last tokens of each request over the paged cache: decode with one, a verify step of speculation with several.

Slots are read from the request table; keys and values, or latent rows.
"""

from __future__ import annotations

from torch import Tensor

from sglang.kernels.launch import triton_impl
from sglang.kernels.ops.activation.sigmoid_mul import sigmoid_mul_torch
from sglang.kernels.ops.attention.decode_padded import decode_padded_torch, last_lengths, queries_per_request
from sglang.kernels.ops.attention.launchers import caches_fit, launch_decode
from sglang.kernels.ops.attention.tiles import MANY_HEADS, RowShape
from sglang.kernels.spec import Impl, Op


def decode_attention_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, req_to_token: Tensor, req_pool_indices: Tensor,
    seq_lens: Tensor, scale: float, rank: int = 0, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of the queries of each request's last W tokens over its slots, each up to its own token.

    q [B*W, Hq, D], packed by request, k_cache [S, Hk, D], v_cache [S, Hk, Dv], req_to_token [R, C] int32 (entries past
    a length are never used), req_pool_indices [B] int64 rows of it, seq_lens [B] int64 in [W, C], for W = 1 in [0, C]
    -> [B*W, Hq, Dv] in q's dtype, computed in float32; a row of length 0 gives zeros. What a later token left in the
    cache, NaN included, changes no query before it. v_cache None and ``rank``: as in ``attention.extend_attention``.
    ``gate`` [B*W, Hq, Dv] in q's dtype, if there is one, gates the result, rounded, as ``activation.sigmoid_mul`` does.
    This reference reads the longest length on the host.
    """
    table = slots_of(req_to_token, req_pool_indices, seq_lens)
    out = decode_padded_torch(q, k_cache, v_cache, table, seq_lens, scale, rank)
    return out if gate is None else sigmoid_mul_torch(out, gate)


def slots_of(req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor) -> Tensor:
    """Slots of the requests, [B, longest] int64."""
    longest = int(seq_lens.max()) if seq_lens.numel() else 0
    return req_to_token[:, :longest].index_select(0, req_pool_indices).long()


def decode_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, req_to_token: Tensor, req_pool_indices: Tensor,
    seq_lens: Tensor, scale: float, rank: int = 0, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    width = queries_per_request(q, seq_lens)
    if v_cache is None and width > 1 and q.shape[1] >= MANY_HEADS:
        # The heads of one query fill a program, and those of the next read what it has just read. On an H200 (triton
        # 3.6.0, 2026-11-29, 4 queries of 128 heads, 32 requests of 1k tokens) a step of V3 takes 8.64 ms so, 9.30 else.
        req_pool_indices = req_pool_indices.repeat_interleave(width)
        seq_lens, width = last_lengths(seq_lens, width).flatten(), 1
    shape, v = RowShape.of_caches(q, v_cache, rank), k_cache if v_cache is None else v_cache
    return launch_decode(q, k_cache, v, req_to_token, req_pool_indices, seq_lens, scale, shape, repeat=width, gate=gate)


def fits_table(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, table: Tensor, rows: Tensor,
    lens: Tensor, scale: float, rank: int = 0, gate: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether the kernels read these rows, this request table and this gate."""
    shape = (*q.shape[:2], rank if v_cache is None else v_cache.shape[2])
    gates = gate is None or (gate.dtype == q.dtype and gate.shape == shape and gate.stride(2) == 1)
    return gates and caches_fit(q, k_cache, v_cache, rank) and table.stride(1) == 1


decode_attention = Op(
    "attention.decode_attention",
    triton_impl(decode_attention_triton, fits_table),
    Impl("torch", decode_attention_torch),
)
