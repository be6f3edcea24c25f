"""One token per row through a whole gated delta net: convolution, gates, recurrence and gated norm, on slots in
place."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import early_start, next_power_of_2, triton_impl
from sglang.kernels.ops.gdn.reference import causal_conv1d_update, gdn_gating, l2_norm, recurrent_gated_delta_rule
from sglang.kernels.ops.gdn.shapes import GDNShape, shape_of, step_fits_triton
from sglang.kernels.ops.gdn.tiles import gdn_tiles
from sglang.kernels.ops.norm.rmsnorm import gated_rms_norm_torch
from sglang.kernels.spec import Impl, Op

# Elements of a tile below which a warp would have several threads hold one of them and race to overwrite it.
ELEMENTS_PER_WARP = 64


def split_heads(convolved: Tensor, shape: GDNShape) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C] -> unit-length q, k [N, HK, K] float32 and v [N, HV, V]."""
    queries_and_keys, v = convolved.split((2 * shape.key_width, convolved.shape[1] - 2 * shape.key_width), dim=-1)
    q, k = l2_norm(queries_and_keys.unflatten(-1, (2, shape.key_heads, shape.k_dim))).unbind(1)
    return q, k, v.unflatten(-1, (shape.value_heads, shape.v_dim))


def gdn_decode_step_torch(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, slot_ids: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The mixer's rows for one more token of each of B sequences, from its projections; their slots move on.

    mixed_qkv [B, C] with C = 2*HK*K + HV*V (q | k | v), z [B, HV, V], b, a [B, HV], conv_weight [C, W], A_log, dt_bias
    [HV], norm_weight [V], conv_state [S, C, W-1], ssm_state [S, HV, V, K], slot_ids [B] int64 -> [B, HV, V] in
    mixed_qkv's dtype, normed and gated by z. Composed of ``causal_conv1d_update``, ``l2_norm``, ``gdn_gating``,
    ``recurrent_gated_delta_rule`` (scale K^-0.5) and ``norm.gated_rms_norm``. A row of slot 0 is padding: its output
    and what slot 0 holds afterwards mean nothing. Yang et al. 2024 (Gated Delta Networks).
    """
    shape = shape_of(mixed_qkv, conv_weight, ssm_state)
    g, beta = gdn_gating(a, b, A_log, dt_bias)
    q, k, v = split_heads(causal_conv1d_update(mixed_qkv, conv_weight, conv_state, slot_ids), shape)
    out = recurrent_gated_delta_rule(q, k, v, g, beta, ssm_state, slot_ids, shape.k_dim**-0.5)
    return gated_rms_norm_torch(out, z, norm_weight, eps)


def gdn_decode_step_triton(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, slot_ids: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """One launch. Padding rows give zeros and leave slot 0 as it is."""
    from sglang.kernels.ops.gdn.decode_step_triton import decode_step_kernel

    shape = shape_of(mixed_qkv, conv_weight, ssm_state)
    rows = mixed_qkv.shape[0]
    out = torch.empty(rows, shape.value_heads, shape.v_dim, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
    block_k, block_v = next_power_of_2(shape.k_dim), next_power_of_2(shape.v_dim)
    tile = gdn_tiles().decode_tile(shape)
    if rows:
        decode_step_kernel[(shape.key_heads, rows)](
            mixed_qkv, z, b, a, conv_weight, A_log, dt_bias, norm_weight, conv_state, ssm_state, slot_ids, out,
            mixed_qkv.stride(0), z.stride(0), b.stride(0), a.stride(0), conv_state.stride(0), ssm_state.stride(0),
            shape.key_heads, shape.k_dim**-0.5, eps,
            K=shape.k_dim, V=shape.v_dim, PER_KEY=shape.per_key, WIDTH=shape.width, ROWS=tile.rows,
            BLOCK_K=block_k, BLOCK_V=block_v, BLOCK_H=next_power_of_2(shape.per_key),
            BLOCK_W=next_power_of_2(shape.width), STAGES=tile.num_stages,
            num_warps=max(1, min(tile.num_warps, tile.rows * block_k // ELEMENTS_PER_WARP)), **early_start(),
        )  # fmt: skip
    return out


gdn_decode_step = Op(
    "gdn.decode_step", triton_impl(gdn_decode_step_triton, step_fits_triton), Impl("torch", gdn_decode_step_torch)
)
