"""Gated activations of the layers."""

from __future__ import annotations

from sglang.kernels.ops.activation.sigmoid_mul import sigmoid_mul
from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul

__all__ = ["sigmoid_mul", "silu_and_mul"]
