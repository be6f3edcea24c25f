"""Packed tokens of several sequences through a whole gated delta net, in chunks, on slots in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.gdn.chunk import CHUNK_SIZE, chunk_gated_delta_rule
from sglang.kernels.ops.gdn.decode_step import split_heads
from sglang.kernels.ops.gdn.reference import causal_conv1d, gdn_gating
from sglang.kernels.ops.gdn.shapes import GDNShape, shape_of, step_fits_triton
from sglang.kernels.ops.gdn.tiles import gdn_tiles
from sglang.kernels.ops.norm.rmsnorm import gated_rms_norm, gated_rms_norm_torch
from sglang.kernels.spec import Impl, Op

# Rows of a chunk that a program of the convolution takes.
CONV_ROWS = 16
# Rows of the diagonal tiles of a chunk's triangular system that are solved row by row.
SOLVE_TILE = 16


def gdn_extend_step_torch(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, slot_ids: Tensor, bounds: Tensor, chunks: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """The mixer's rows for the packed tokens of B sequences, from their projections; their slots move on.

    Arguments as ``gdn.decode_step`` with N packed rows, slot_ids [B] all different except 0, the slot of padding, whose
    contents then are undefined; ``bounds`` and ``chunks`` as ``chunk_table`` makes them of the sequences' lengths, of
    which some may be zero, next to the other tensors. Further chunks past a sequence's end are ignored.
    -> [N, HV, V] in mixed_qkv's dtype. Composed of ``causal_conv1d``, ``l2_norm``, ``gdn_gating``,
    ``chunk_gated_delta_rule`` (scale K^-0.5) and ``norm.gated_rms_norm``.
    """
    shape, seq_lens = shape_of(mixed_qkv, conv_weight, ssm_state), bounds.diff().tolist()
    g, beta = gdn_gating(a, b, A_log, dt_bias)
    history = conv_state.index_select(0, slot_ids)
    convolved, last = causal_conv1d(mixed_qkv, conv_weight, history, seq_lens)
    conv_state.index_copy_(0, slot_ids, last)
    q, k, v = split_heads(convolved, shape)
    initial = ssm_state.index_select(0, slot_ids)
    out, final = chunk_gated_delta_rule(q, k, v, g, beta, initial, seq_lens, shape.k_dim**-0.5)
    ssm_state.index_copy_(0, slot_ids, final.to(ssm_state.dtype))
    return gated_rms_norm_torch(out, z, norm_weight, eps)


def run_conv(
    mixed_qkv: Tensor, conv_weight: Tensor, conv_state: Tensor, slot_ids: Tensor, bounds: Tensor, chunks: Tensor,
    shape: GDNShape,
) -> Tensor:  # fmt: skip
    """q | k | v [N, C] after the convolution, queries and keys at unit length, in mixed_qkv's dtype."""
    from sglang.kernels.ops.gdn.extend_step_triton import conv_heads_kernel

    out = torch.empty(mixed_qkv.shape, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
    block = next_power_of_2(max(shape.k_dim, shape.v_dim))
    conv_heads_kernel[(chunks.shape[0] * (CHUNK_SIZE // CONV_ROWS), 2 * shape.key_heads + shape.value_heads)](
        mixed_qkv, conv_weight, conv_state, slot_ids, bounds, chunks, out,
        mixed_qkv.stride(0), out.stride(0), conv_state.stride(0), shape.key_heads,
        K=shape.k_dim, V=shape.v_dim, WIDTH=shape.width,
        BLOCK_D=block, BLOCK_W=next_power_of_2(shape.width), CHUNK=CHUNK_SIZE, ROWS=CONV_ROWS,
        num_warps=4,
    )  # fmt: skip
    return out


def run_chunks(
    qkv: Tensor, b: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor, ssm_state: Tensor, slot_ids: Tensor,
    bounds: Tensor, chunks: Tensor, shape: GDNShape,
) -> Tensor:  # fmt: skip
    """The chunked rule on what ``run_conv`` gives: [N, HV, V] before the norm."""
    from sglang.kernels.ops.gdn.extend_step_triton import scan_chunks_kernel, solve_chunks_kernel

    tokens, heads, dtype = qkv.shape[0], shape.value_heads, qkv.dtype
    block_k, block_v = max(16, next_power_of_2(shape.k_dim)), max(16, next_power_of_2(shape.v_dim))

    def empty(width: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(tokens, heads, width, dtype=kind, device=qkv.device)

    values, reads, scores, out = empty(shape.v_dim), empty(shape.k_dim), empty(CHUNK_SIZE), empty(shape.v_dim)
    since, until = empty(1, torch.float32), empty(1, torch.float32)
    scratch_shape = (chunks.shape[0], heads, CHUNK_SIZE, SOLVE_TILE + 1)
    scratch = torch.empty(scratch_shape, dtype=torch.float32, device=qkv.device)
    tiles = gdn_tiles()
    limit = {} if tiles.solve_registers is None else {"maxnreg": tiles.solve_registers}
    scale = shape.k_dim**-0.5
    solve_chunks_kernel[(chunks.shape[0], heads)](
        qkv, b, a, A_log, dt_bias, bounds, chunks, values, reads, scores, since, until, scratch,
        qkv.stride(0), b.stride(0), a.stride(0), shape.key_heads, heads, shape.per_key, scale,
        K=shape.k_dim, V=shape.v_dim, BLOCK_K=block_k, BLOCK_V=block_v,
        CHUNK=CHUNK_SIZE, TILE=SOLVE_TILE, LANES=tiles.lanes,
        PRECISION="ieee" if dtype == torch.float32 else tiles.inverse_precision, num_warps=4, num_stages=1, **limit,
    )  # fmt: skip
    tile = tiles.scan_tile(shape, slot_ids.shape[0], dtype)
    scan_chunks_kernel[(cdiv(shape.v_dim, tile.rows), heads, slot_ids.shape[0])](
        qkv, values, reads, scores, since, until, ssm_state, slot_ids, bounds, out,
        qkv.stride(0), ssm_state.stride(0), shape.key_heads, heads, shape.per_key, scale,
        K=shape.k_dim, V=shape.v_dim, BLOCK_K=block_k, BLOCK_V=tile.rows, CHUNK=CHUNK_SIZE,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def gdn_extend_step_triton(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, slot_ids: Tensor, bounds: Tensor, chunks: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """Four launches: convolution, chunks alone, scan over them, norm. Operands of products are in mixed_qkv's dtype."""
    shape = shape_of(mixed_qkv, conv_weight, ssm_state)
    if chunks.shape[0] == 0:
        return torch.empty_like(z, memory_format=torch.contiguous_format)
    qkv = run_conv(mixed_qkv, conv_weight, conv_state, slot_ids, bounds, chunks, shape)
    out = run_chunks(qkv, b, a, A_log, dt_bias, ssm_state, slot_ids, bounds, chunks, shape)
    return gated_rms_norm(out, z, norm_weight, eps)


gdn_extend_step = Op(
    "gdn.extend_step", triton_impl(gdn_extend_step_triton, step_fits_triton), Impl("torch", gdn_extend_step_torch)
)
