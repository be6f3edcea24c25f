"""RMS norms: plain, zero-centred (``1 + w``) and gated; the residual add belongs to the norm."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from sglang.kernels.ops.norm.add_norm_logits import add_norm_logits, are_few
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm
from sglang.kernels.ops.norm.norm_product import norm_product
from sglang.kernels.ops.norm.rmsnorm import rms_norm
from sglang.kernels.ops.norm.rmsnorm_quantized import rms_norm_quantized
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.layers.quantization import ProjectedRows, Rows
from sglang.srt.layers.weights import make_parameter


class RoutedRows(NamedTuple):
    """Normed rows [N, D], and their logits [N, E] by a router's weight."""

    rows: Rows
    logits: torch.Tensor


class Router(Protocol):
    """What routes rows by a product with ``router_weight`` [E, D], in ``logits_dtype``."""

    router_weight: torch.Tensor
    logits_dtype: torch.dtype


class Projection(Protocol):
    """What begins with a product of its rows and ``matrix`` [R, D], and takes ``ProjectedRows`` in their place."""

    @property
    def matrix(self) -> torch.Tensor | None: ...


class RMSNorm(nn.Module):
    """``w * x / rms(x)`` over the last dimension."""

    unit_weight = 1.0
    unit_offset = False
    weight_dtype: torch.dtype | None = None  # the model's

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(hidden_size, dtype=self.weight_dtype, fill=(self.unit_weight, 0.0))
        self._row_dtype: torch.dtype | None = None
        # Tuples, as these are modules elsewhere.
        self._routers: tuple[Router, ...] = ()
        self._projections: tuple[Projection, ...] = ()

    def quantize_for(self, consumer: Any) -> None:
        """Give rows quantised, and as they are besides, if ``consumer.row_dtype`` says that it takes such."""
        self._row_dtype = consumer.row_dtype

    def route_for(self, router: Router) -> None:
        """Give few rows that come with a residual as ``RoutedRows`` of ``router``."""
        self._routers = (router,)

    def project_for(self, projection: Projection) -> None:
        """Give one row as ``ProjectedRows`` of ``projection``, as launches limit a step of one request."""
        self._projections = (projection,)

    def _projected(
        self, x: torch.Tensor, residual: torch.Tensor | None, matrix: torch.Tensor
    ) -> ProjectedRows | tuple[ProjectedRows, torch.Tensor]:
        product, normed, total = norm_product(x, residual, self.weight, self.eps, matrix, self.unit_offset)
        rows = ProjectedRows(normed, product)
        return rows if residual is None else (rows, total)

    def _routed(self, x: torch.Tensor, residual: torch.Tensor, router: Router) -> tuple[RoutedRows, torch.Tensor]:
        normed, total, logits, *made = add_norm_logits(
            x, residual, self.weight, self.eps, router.router_weight, router.logits_dtype, self.unit_offset,
            self._row_dtype,
        )  # fmt: skip
        return RoutedRows(QuantizedRows(made[0], made[1], x.dtype, normed) if made else normed, logits), total

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> Rows | ProjectedRows | tuple[Rows | ProjectedRows | RoutedRows, torch.Tensor]:
        """x [..., D] -> normed; with a residual -> (norm(x + residual), x + residual)."""
        if self._projections and x.shape[0] == 1 and (matrix := self._projections[0].matrix) is not None:
            return self._projected(x, residual, matrix)
        if self._routers and residual is not None and are_few(x):
            return self._routed(x, residual, *self._routers)
        if self._row_dtype is not None:
            normed, q, scale, total = rms_norm_quantized(x, residual, self.weight, self.eps, self._row_dtype)
            rows = QuantizedRows(q, scale, x.dtype, normed)
            return rows if residual is None else (rows, total)
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.unit_offset)
        return fused_add_rms_norm(x, residual, self.weight, self.eps, self.unit_offset)


class Float32RMSNorm(RMSNorm):
    """The same with a float32 weight for rows of any dtype, rounded once."""

    weight_dtype = torch.float32


class GemmaRMSNorm(RMSNorm):
    """``(1 + w) * x / rms(x)``: a zero weight is unit gain."""

    unit_weight = 0.0
    unit_offset = True


class RMSNormGated(nn.Module):
    """Weight and eps of ``w * x / rms(x) * silu(gate)``, which the step ops of gated delta nets end with."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(dim, fill=(1.0, 0.0))
