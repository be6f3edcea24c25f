"""The gated feed-forward of dense layers and shared experts."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul, silu_and_mul_quantized
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization import Rows


class GatedMLP(nn.Module):
    """``down(silu(gate x) * up x)``, a part unless reduced; ``swiglu_limit`` as in ``activation.silu_and_mul``."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        reduce_results: bool = True,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
        swiglu_limit: float | None = None,
    ) -> None:
        super().__init__()
        self.swiglu_limit = swiglu_limit
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [intermediate, intermediate], quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            intermediate, hidden, reduce_results, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )

    @property
    def row_dtype(self) -> torch.dtype | None:
        """As a linear layer's."""
        return self.gate_up_proj.row_dtype

    def forward(self, x: Rows) -> torch.Tensor:
        """x [N, H] -> [N, H]."""
        gate_up, dtype = self.gate_up_proj(x), self.down_proj.row_dtype
        if dtype is None:
            return self.down_proj(silu_and_mul(gate_up, self.swiglu_limit))
        q, scale = silu_and_mul_quantized(gate_up, dtype, self.swiglu_limit)
        return self.down_proj(QuantizedRows(q, scale, gate_up.dtype))
