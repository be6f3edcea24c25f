"""Host side of the Triton attention kernels: strides, grids and splits; reads shapes and never device data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, early_start, imports_gluon, next_power_of_2
from sglang.kernels.ops.attention.kv_cache import is_cache_dtype
from sglang.kernels.ops.attention.tiles import RowShape, Tile, decode_tile, extend_tile, split_count
from sglang.kernels.ops.quant.group_fp8 import GROUP, empty_quantized
from sglang.srt.platforms import current_platform

# Widest key row with values of its own, and widest latent row, that the kernels hold.
MAX_HEAD_DIM = 256
MAX_LATENT_DIM = 576
# Partial rows that a program of the merge reads at once, and programs up to which it takes one head.
MERGE_WIDTH = 16
MERGE_PROGRAMS = 2048
# Columns of W_UV that a program of the merge multiplies at once, and programs up to which it does: beyond, each head's
# parts would be merged too often (by reasoning, not measured).
PROJECT_COLUMNS = 16
PROJECT_PROGRAMS = 256


def rows_fit(q: Tensor, k: Tensor, v: Tensor, k_tail: Tensor | None = None) -> bool:
    """True when the kernels take q [., Hq, D], k [., Hk, D - P], k_tail [., P], v [., Hk, Dv] with values of their own.

    Keys and values of another dtype than q's are converted to it as they are read.
    """
    keys = (k,) if k_tail is None else (k, k_tail)
    same = all(key.dtype == v.dtype for key in keys) and is_cache_dtype(v.dtype, q.dtype)
    dense = all(tensor.stride(-1) == 1 for tensor in (q, *keys, v))
    shapes = q.shape[-1] == sum(key.shape[-1] for key in keys) <= MAX_HEAD_DIM and v.shape[-1] <= MAX_HEAD_DIM
    return same and dense and shapes and q.shape[1] % k.shape[1] == 0


def caches_fit(q: Tensor, k_cache: Tensor, v_cache: Tensor | None, rank: int) -> bool:
    """``rows_fit``, and without values whether the kernels take the first ``rank`` columns of the keys as those."""
    if v_cache is not None:
        return rows_fit(q, k_cache, v_cache)
    dense = q.stride(-1) == 1 and k_cache.stride(-1) == 1
    shapes = rank < q.shape[-1] == k_cache.shape[-1] <= MAX_LATENT_DIM
    return is_cache_dtype(k_cache.dtype, q.dtype) and dense and shapes


def fits_specialised_warps(q: Tensor, k: Tensor, shape: RowShape, tile: Tile, repeat: int) -> bool:
    """Whether the kernel for sm_90 whose warps fetch or multiply takes the place of ``decode_kernel``.

    It takes one query per request, whole blocks of 64 heads over one row of 512 and 64 columns per token, all of one
    dtype of 16 bits, in rows that begin at 32 bytes.
    """
    sizes = (shape.main, shape.tail, shape.value_is_key, tile.rows, tile.block_n) == (512, 64, True, 64, 64)
    if current_platform.arch != "sm_90" or not sizes or repeat > 1 or k.shape[1] != 1 or q.shape[1] % tile.rows:
        return False
    starts = (q.data_ptr(), k.data_ptr(), *(2 * stride for stride in (*q.stride()[:2], k.stride(0))))
    plain = q.dtype == k.dtype in (torch.bfloat16, torch.float16) and all(start % 32 == 0 for start in starts)
    return plain and imports_gluon("sglang.kernels.ops.attention.decode_sm90_triton")


def gate_options(gate: Tensor | None) -> dict[str, Any]:
    """Arguments of a kernel whose result [N, H, V] is gated, if it is."""
    if gate is None:
        return {}
    return {"gate_ptr": gate, "gate_stride": gate.stride(0), "gate_head_stride": gate.stride(1)}


def merge_parts(parts: Tensor, lse: Tensor, dtype: torch.dtype, gate: Tensor | None = None) -> Tensor:
    """parts [N, S, H, V], lse [N, S, H] float32, gate [N, H, V] or None -> [N, H, V] in ``dtype``; sums in order."""
    from sglang.kernels.ops.attention.decode_triton import merge_splits_kernel

    num_rows, splits, heads, value = parts.shape
    out = torch.empty(num_rows, heads, value, dtype=dtype, device=parts.device)
    block_v = min(256, max(16, next_power_of_2(value)))
    blocks = cdiv(value, block_v)
    # Few rows: a program for each head reads many parts at once. Many rows have few parts: a program takes more heads.
    block_h = 1 if num_rows * heads * blocks <= MERGE_PROGRAMS else min(MERGE_WIDTH // 2, next_power_of_2(heads))
    merge_splits_kernel[(num_rows, cdiv(heads, block_h), blocks)](
        parts, lse, out, heads, splits,
        HEADS=block_h, STEP=max(2, MERGE_WIDTH // block_h), VALUE=value, BLOCK_V=block_v,
        num_warps=2, **gate_options(gate), **early_start(),
    )  # fmt: skip
    return out


def projects(parts: Tensor, w: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``project_parts`` is to take these."""
    block = PROJECT_COLUMNS if dtype is None else GROUP
    programs = parts.shape[0] * parts.shape[2] * cdiv(w.shape[2], block)
    return w.stride(1) == 1 and programs <= PROJECT_PROGRAMS and (dtype is None or w.shape[2] % GROUP == 0)


def project_parts(parts: Tensor, lse: Tensor, w: Tensor, dtype: torch.dtype | None) -> Tensor | tuple[Tensor, Tensor]:
    """``merge_parts`` and each head's row times w [H, V, D] -> [N, H * D]; with an 8-bit ``dtype`` q and its scale."""
    from sglang.kernels.ops.attention.decode_triton import merge_project_kernel

    num_rows, splits, heads, value = parts.shape
    width = w.shape[2]
    made: tuple[Tensor, ...]
    if dtype is None:
        made, strides, tiles = (torch.empty(num_rows, heads * width, dtype=w.dtype, device=w.device),), (0, 0), 1
    else:
        made = empty_quantized(num_rows, heads * width, dtype, w.device)
        strides, tiles = made[1].stride(), GROUP // PROJECT_COLUMNS
    merge_project_kernel[(num_rows * heads, cdiv(width, tiles * PROJECT_COLUMNS))](
        parts, lse, w, made[0], made[-1], heads, splits, width, w.stride(0), w.stride(2), *strides,
        STEP=MERGE_WIDTH, VALUE=value, BLOCK_V=next_power_of_2(value),
        TILES=tiles, COLUMNS=PROJECT_COLUMNS, STAGES=3 if current_platform.kind == "cuda" and tiles > 1 else 1,
        LARGEST=None if dtype is None else torch.finfo(dtype).max, num_warps=8, **early_start(),
    )  # fmt: skip
    return made[0] if dtype is None else made


def launch_decode(*args: Any, **kwargs: Any) -> Tensor:
    """``launch_parts``, merged: [., Hq, Dv] in q's dtype."""
    parts, lse = launch_parts(*args, **kwargs)
    return parts if lse is None else merge_parts(parts, lse, args[0].dtype, kwargs.get("gate"))


def launch_parts(
    q: Tensor, k: Tensor, v: Tensor, req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, scale: float,
    shape: RowShape, tile: Tile | None = None, splits: int | None = None, repeat: int = 1, gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``repeat`` queries per request over its slots: q [B*repeat, Hq, D], k [S, Hk, D], v [S, Hk, Dv] -> parts
    [., splits, Hq, Dv] and their lse [., splits, Hq] float32, or of one split the result [., Hq, Dv] alone, gated.

    They are those of its last tokens, and ``seq_lens`` the lengths that the last one sees. ``tile`` and ``splits`` are
    for tuning and for tests of their invariance; None takes the tables' choice. Raises ValueError for another number of
    queries.
    """
    from sglang.kernels.ops.attention.decode_triton import decode_kernel

    batch, (num_rows, heads, _) = seq_lens.shape[0], q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if batch == 0:
        return torch.empty(num_rows, heads, shape.value, dtype=q.dtype, device=q.device), None
    if num_rows != batch * repeat:
        raise ValueError(f"{num_rows} queries are not {repeat} of each of {batch} requests: some would not be written")
    found, heads_are_rows = decode_tile(shape, group * repeat, q.dtype, k.dtype)
    tile = tile or found
    programs = kv_heads * cdiv(group * repeat, tile.rows)
    if splits is None:
        part_bytes = 4 * num_rows * heads * shape.value
        splits = split_count(batch * programs, req_to_token.shape[1], tile, part_bytes)
    if splits > 1:
        parts = torch.empty(num_rows, splits, heads, shape.value, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, splits, heads, dtype=torch.float32, device=q.device)
    else:
        parts = lse = torch.empty(num_rows, heads, shape.value, dtype=q.dtype, device=q.device)
    if tile is found and gate is None and fits_specialised_warps(q, k, shape, tile, repeat):
        from sglang.kernels.ops.attention.decode_sm90_triton import decode_heads_sm90_kernel

        decode_heads_sm90_kernel[(programs, batch, splits)](
            q, k, req_to_token, req_pool_indices, seq_lens, parts, lse,
            scale, heads, splits, q.stride(0), q.stride(1), k.stride(0), req_to_token.stride(0), WHOLE=splits == 1,
            num_warps=4,
        )  # fmt: skip
        return parts, lse if splits > 1 else None
    decode_kernel[(programs, batch, splits)](
        q, k, v, req_to_token, req_pool_indices, seq_lens, parts, lse,
        scale, heads, group, splits,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), req_to_token.stride(0),
        **shape.constants(), HEADS=tile.rows, BLOCK_N=tile.block_n, WHOLE=splits == 1, REPEAT=repeat,
        HEAD_AXIS=0 if heads_are_rows else 1, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **gate_options(gate if splits == 1 else None), **early_start(),
    )  # fmt: skip
    return parts, lse if splits > 1 else None


def launch_extend(
    q: Tensor, k: Tensor, v: Tensor, slot_ids: Tensor | None, qo_indptr: Tensor, kv_indptr: Tensor, scale: float,
    shape: RowShape, causal: bool = True, with_lse: bool = False, k_tail: Tensor | None = None,
    tile: Tile | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed queries over slots, or over packed rows when ``slot_ids`` is None -> out [N, Hq, Dv], lse [N, Hq] float32.

    k_tail [., P] holds the last columns of every head's keys where k lacks them. lse is written on request. Few
    queries over long contexts are split, unless the lse is wanted.
    """
    from sglang.kernels.ops.attention.extend_triton import extend_kernel

    num_rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    batch = qo_indptr.shape[0] - 1
    out = torch.empty(num_rows, heads, shape.value, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_rows, heads if with_lse else 0, dtype=torch.float32, device=q.device)
    if num_rows == 0 or batch == 0:
        return out, lse
    tile = tile or extend_tile(shape, q.dtype, k.dtype)
    tiles = num_rows * group // tile.rows + batch
    if splits is None:
        tokens = k.shape[0] if slot_ids is None else slot_ids.shape[0]
        part_bytes = 4 * num_rows * heads * shape.value
        splits = 1 if with_lse else split_count(tiles * kv_heads, tokens, tile, part_bytes, min_blocks=4)
    parts, parts_lse = out, lse
    if splits > 1:
        parts = torch.empty(num_rows, splits, heads, shape.value, dtype=torch.float32, device=q.device)
        parts_lse = torch.empty(num_rows, splits, heads, dtype=torch.float32, device=q.device)
    # Without slots to look up, a stage more is kept in shared memory, and three of wide rows do not fit.
    stages = min(tile.num_stages, 2) if slot_ids is None and shape.kind == "wide" else tile.num_stages
    tail = k[..., shape.main :] if k_tail is None else k_tail.unsqueeze(1).expand(-1, kv_heads, -1)
    extend_kernel[(kv_heads, tiles, splits)](
        q, k, tail, v, qo_indptr if slot_ids is None else slot_ids, qo_indptr, kv_indptr, parts, parts_lse,
        scale, batch, heads, group, splits,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), tail.stride(0), tail.stride(1), v.stride(0), v.stride(1),
        **shape.constants(), BLOCK_M=tile.rows, BLOCK_N=tile.block_n, BLOCK_B=128,
        PAGED=slot_ids is not None, CAUSAL=causal, WRITE_LSE=with_lse or splits > 1,
        num_warps=tile.num_warps, num_stages=stages,
    )  # fmt: skip
    return merge_parts(parts, parts_lse, q.dtype) if splits > 1 else out, lse
