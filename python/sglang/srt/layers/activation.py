"""Gated activations of the feed-forward layers."""

from __future__ import annotations

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul

__all__ = ["silu_and_mul"]
