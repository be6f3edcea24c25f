"""The feed-forward blocks that the Qwen MoE models share: gated MLP, and routed experts beside a gated shared one."""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.activation import silu_and_mul
from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.multi_stream_utils import StreamOverlap


class Qwen2MoeMLP(nn.Module):
    """``down(silu(gate x) * up x)`` of inner width ``intermediate_size``."""

    def __init__(self, hidden_size: int, intermediate_size: int, reduce_results: bool = True) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, [intermediate_size, intermediate_size])
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, reduce_results=reduce_results)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, H] -> [N, H], a partial sum of this rank unless reduced."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class Qwen2MoeSparseMoeBlock(nn.Module):
    """``sum_j w_j expert_j(x) + sigmoid(shared_expert_gate x) * shared_expert(x)``.

    Weights w are softmax over all experts, the ``num_experts_per_tok`` largest, renormalised. quant_config must be
    None. The shared expert is never computed as one of the routed ones, whatever ``support_shared_expert_fusion``
    allows: ``num_fused_shared_experts`` is 0.
    """

    def __init__(
        self,
        layer_id: int,
        config: Qwen3_5Config,
        quant_config: None = None,
        alt_stream: torch.cuda.Stream | None = None,
        prefix: str = "",
        is_nextn: bool = False,
        support_shared_expert_fusion: bool = False,
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise ValueError(f"{prefix or 'mlp'}: quantised experts are not supported; build with quant_config=None")
        self.layer_id = layer_id
        self.prefix = prefix
        self.is_nextn = is_nextn
        self.support_shared_expert_fusion = support_shared_expert_fusion
        self.num_fused_shared_experts = 0
        self._tp = get_tp_group()
        self.overlap = StreamOverlap(alt_stream)
        hidden_size = config.hidden_size
        self.gate = ReplicatedLinear(hidden_size, config.num_experts)
        self.topk = TopK(config.num_experts_per_tok, "softmax", renormalize=config.norm_topk_prob)
        # Both parts stay partial sums of this rank; the block reduces once.
        self.experts = FusedMoE(
            config.num_experts, hidden_size, config.moe_intermediate_size, config.num_experts_per_tok,
            reduce_results=False,
        )  # fmt: skip
        self.shared_expert = Qwen2MoeMLP(hidden_size, config.shared_expert_intermediate_size, reduce_results=False)
        self.shared_expert_gate = ReplicatedLinear(hidden_size, 1)

    def extra_repr(self) -> str:
        return f"layer_id={self.layer_id}, prefix={self.prefix!r}, is_nextn={self.is_nextn}"

    def forward(self, x: torch.Tensor, fb: ForwardBatch) -> torch.Tensor:
        """x [N, H] -> [N, H]."""
        shared, routed = self.overlap.fork_join(
            lambda: self._forward_shared_experts(x), lambda: self._forward_router_experts(x, fb), num_tokens=x.shape[0]
        )
        return self._tp.all_reduce(routed + shared)

    def _forward_shared_experts(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared_expert(x) * self.shared_expert_gate(x).sigmoid()

    def _forward_router_experts(self, x: torch.Tensor, fb: ForwardBatch) -> torch.Tensor:
        return self.experts(x, self.topk(self.gate(x)), fb)
