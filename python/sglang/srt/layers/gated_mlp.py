"""The gated feed-forward of dense layers and shared experts."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """``down(silu(gate x) * up x)`` of inner width ``intermediate``, a partial sum of this rank unless reduced.

    ``swiglu_limit`` clamps as in ``activation.silu_and_mul``.
    """

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, H] -> [N, H]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x), self.swiglu_limit))
