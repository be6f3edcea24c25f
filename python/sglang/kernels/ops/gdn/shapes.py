"""Sizes of a gated delta net, read from the tensors of a step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sglang.kernels.launch import FLOATS, next_power_of_2

# Elements of one head's state up to which the kernels are known to fit registers and local memory.
MAX_STATE_TILE = 1 << 14


class GDNShape(NamedTuple):
    """Heads of this rank and their sizes; ``width`` is the convolution's W."""

    key_heads: int
    value_heads: int
    k_dim: int
    v_dim: int
    width: int

    @property
    def per_key(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def key_width(self) -> int:
        """Channels of all query heads, or of all key heads."""
        return self.key_heads * self.k_dim


def shape_of(mixed_qkv: Tensor, conv_weight: Tensor, ssm_state: Tensor) -> GDNShape:
    """Sizes from mixed_qkv [N, C], conv_weight [C, W] and ssm_state [S, HV, V, K], where C = 2*HK*K + HV*V."""
    _, value_heads, v_dim, k_dim = ssm_state.shape
    key_heads = (mixed_qkv.shape[1] - value_heads * v_dim) // (2 * k_dim)
    return GDNShape(key_heads, value_heads, k_dim, v_dim, conv_weight.shape[1])


def step_fits_triton(
    mixed_qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, conv_state: Tensor, ssm_state: Tensor, *rest: object,
) -> bool:  # fmt: skip
    """Whether the Triton steps take these: one dtype for activations, dense rows, a state of a known size.

    ``rest``: the step's other arguments, whose tensors say where rows and states are and must be contiguous.
    """
    shape = shape_of(mixed_qkv, conv_weight, ssm_state)
    parameters = (conv_weight, A_log, dt_bias, norm_weight)
    floats = (mixed_qkv, z, b, a, *parameters, conv_state, ssm_state)
    dense_rows = all(x.stride(-1) == 1 for x in (mixed_qkv, b, a)) and z.stride()[1:] == (shape.v_dim, 1)
    dense_state = conv_state[0].is_contiguous() and ssm_state[0].is_contiguous()
    return (
        all(x.dtype in FLOATS for x in floats)
        and z.dtype == norm_weight.dtype == mixed_qkv.dtype
        and dense_rows
        and dense_state
        and all(x.is_contiguous() for x in (*parameters, *rest) if isinstance(x, Tensor))
        and next_power_of_2(shape.k_dim) * next_power_of_2(shape.v_dim) <= MAX_STATE_TILE
    )
