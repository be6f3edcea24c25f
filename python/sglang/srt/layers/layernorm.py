"""RMS norms: plain, zero-centred (``1 + w``) and gated; the residual add belongs to the norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_gemma_rms_norm, fused_add_rms_norm
from sglang.kernels.ops.norm.rmsnorm import gemma_rms_norm, rms_norm
from sglang.kernels.ops.norm.rmsnorm_quantized import rms_norm_quantized
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.layers.quantization import Rows
from sglang.srt.layers.weights import make_parameter


class RMSNorm(nn.Module):
    """``w * x / rms(x)`` over the last dimension."""

    unit_weight = 1.0
    norm, add_norm = rms_norm, fused_add_rms_norm
    weight_dtype: torch.dtype | None = None  # the model's

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(hidden_size, dtype=self.weight_dtype, fill=(self.unit_weight, 0.0))
        self._row_dtype: torch.dtype | None = None

    def quantize_for(self, consumer: Any) -> None:
        """Give rows quantised, and as they are besides, if ``consumer.row_dtype`` says that it takes such."""
        self._row_dtype = consumer.row_dtype

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Rows | tuple[Rows, torch.Tensor]:
        """x [..., D] -> normed; with a residual -> (norm(x + residual), x + residual)."""
        if self._row_dtype is not None:
            normed, q, scale, total = rms_norm_quantized(x, residual, self.weight, self.eps, self._row_dtype)
            rows = QuantizedRows(q, scale, x.dtype, normed)
            return rows if residual is None else (rows, total)
        if residual is None:
            return self.norm(x, self.weight, self.eps)
        return self.add_norm(x, residual, self.weight, self.eps)


class Float32RMSNorm(RMSNorm):
    """The same with a float32 weight for rows of any dtype, rounded once."""

    weight_dtype = torch.float32


class GemmaRMSNorm(RMSNorm):
    """``(1 + w) * x / rms(x)``: a zero weight is unit gain."""

    unit_weight = 0.0
    norm, add_norm = gemma_rms_norm, fused_add_gemma_rms_norm


class RMSNormGated(nn.Module):
    """Weight and eps of ``w * x / rms(x) * silu(gate)``, which the step ops of gated delta nets end with."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(dim, fill=(1.0, 0.0))
