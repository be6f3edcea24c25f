"""Latent attention from its projections to queries and cache rows: rotation, latent norm and the write, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, early_start, next_power_of_2, triton_impl
from sglang.kernels.ops.attention.kv_cache import is_cache_dtype, write_latent_torch
from sglang.kernels.ops.norm.rmsnorm import rms_norm_torch
from sglang.kernels.ops.rope.rotary import rotary_torch
from sglang.kernels.spec import Impl, Op

# Rotated pairs of query heads that a program turns.
PAIRS_PER_PROGRAM = 1024
# Bytes of W_UK, read once for each token, up to which its product is part of the launch, and columns of the product
# that a program makes (by reasoning, not measured).
ABSORB_BYTES = 16 << 20
ABSORB_COLUMNS = 64


def prepare_mla_torch(
    q: Tensor, kv_a: Tensor, positions: Tensor, cos_sin_cache: Tensor, norm_weight: Tensor, latent_cache: Tensor,
    slot_ids: Tensor, eps: float, is_neox: bool, queries: Tensor | None = None, w_kc: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the last P columns of q and of kv_a, norm the rest of kv_a, and write it as the tokens' cache rows.

    q [N, H, nope+P], kv_a [N, R+P], positions [N], cos_sin_cache [max, P], norm_weight [R], latent_cache [S, R+P],
    slot_ids [N] int64 in [0, S). The rotated part of q replaces q's own, or goes into the last P columns of
    ``queries`` [N, H, R+P], whose others take the rest of q times w_kc [H, nope, R], or stay without it. Returns the
    tensor that took it. Rounds where ``rope.rotary``, ``norm.rms_norm`` do; an 8-bit cache takes what it can hold, as
    in ``kv_cache.write_kv``.
    """
    rope = cos_sin_cache.shape[1]
    latent, k_pe = kv_a.split((kv_a.shape[1] - rope, rope), dim=-1)
    q_pe, k_pe = rotary_torch(positions, q[..., -rope:], k_pe.unsqueeze(1), cos_sin_cache, is_neox)
    row = torch.cat((rms_norm_torch(latent, norm_weight, eps), k_pe.squeeze(1)), dim=-1)
    write_latent_torch(row, latent_cache, slot_ids)
    out = q if queries is None else queries
    out[..., -rope:] = q_pe
    if queries is not None and w_kc is not None:
        absorb(q, w_kc, queries)
    return out


def absorb(q: Tensor, w_kc: Tensor, queries: Tensor) -> None:
    """The first columns of q [N, H, >= nope] times w_kc [H, nope, R] into the first R of queries [N, H, >= R]."""
    _, nope, rank = w_kc.shape
    torch.bmm(q[..., :nope].transpose(0, 1), w_kc, out=queries[..., :rank].transpose(0, 1))


def prepare_mla_triton(
    q: Tensor, kv_a: Tensor, positions: Tensor, cos_sin_cache: Tensor, norm_weight: Tensor, latent_cache: Tensor,
    slot_ids: Tensor, eps: float, is_neox: bool, queries: Tensor | None = None, w_kc: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from sglang.kernels.ops.attention.prepare_triton import prepare_mla_kernel

    out = q if queries is None else queries
    tokens, heads, _ = q.shape
    rope = cos_sin_cache.shape[1]
    rank, half = kv_a.shape[1] - rope, rope // 2
    source, target = q[..., -rope:], out[..., -rope:]
    if tokens:
        pairs = next_power_of_2(half)
        block = min(next_power_of_2(heads), max(1, PAIRS_PER_PROGRAM // pairs))
        head_blocks, tiles = cdiv(heads, block), 0
        nope, strides = 0, (0, 0)
        if w_kc is not None:
            nope, strides = w_kc.shape[1], (w_kc.stride(0), w_kc.stride(1))
            if tokens * w_kc.numel() * w_kc.itemsize <= ABSORB_BYTES:
                tiles = cdiv(rank, ABSORB_COLUMNS)
            else:
                absorb(q, w_kc, out)
        # The parts of one token side by side: rows are tens of kilobytes apart.
        blocks = 1 + head_blocks + heads * tiles
        prepare_mla_kernel[(tokens * blocks,)](
            source, target, kv_a, positions, cos_sin_cache, norm_weight, latent_cache, slot_ids, q, w_kc, out,
            heads, blocks, head_blocks, rank, nope, *strides, eps,
            source.stride(0), source.stride(1), target.stride(0), target.stride(1),
            kv_a.stride(0), cos_sin_cache.stride(0), latent_cache.stride(0),
            HALF=half, IS_NEOX=is_neox, HEADS=block, PAIRS=pairs, RANK=next_power_of_2(rank),
            TILES=tiles, NOPE=next_power_of_2(nope), COLUMNS=ABSORB_COLUMNS, num_warps=4, **early_start(),
        )  # fmt: skip
    return out


def _accepts(
    q: Tensor, kv_a: Tensor, positions: Tensor, cos_sin_cache: Tensor,
    norm_weight: Tensor, latent_cache: Tensor, slot_ids: Tensor, eps: float, is_neox: bool,
    queries: Tensor | None = None, w_kc: Tensor | None = None,
) -> bool:  # fmt: skip
    given = [tensor for tensor in (queries, w_kc) if tensor is not None]
    rows = (q, kv_a, latent_cache, cos_sin_cache, *given)
    dense = all(tensor.stride(-1) == 1 for tensor in rows)
    flat = all(tensor.is_contiguous() for tensor in (positions, slot_ids, norm_weight))
    same = q.dtype == kv_a.dtype == norm_weight.dtype and all(tensor.dtype == q.dtype for tensor in given)
    return dense and flat and same and q.dtype in FLOATS and is_cache_dtype(latent_cache.dtype, q.dtype)


prepare_mla = Op("prepare.mla", triton_impl(prepare_mla_triton, _accepts), Impl("torch", prepare_mla_torch))
