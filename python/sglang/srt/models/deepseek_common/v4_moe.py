"""The MoE block of DeepSeek V4: experts by score or by token id, and one shared expert, all clamped."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.moe.topk import Routing
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.gated_mlp import GatedMLP
from sglang.srt.layers.moe.ep_moe.factory import make_experts
from sglang.srt.layers.moe.topk import HashTopK, TopK, TopKOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_common.moe import MoEGate
from sglang.srt.utils.multi_stream_utils import StreamOverlap

SCORING = "sqrtsoftplus"


class DeepseekV4MoE(nn.Module):
    """Routed experts plus the shared one; ``hashed`` layers take the experts that a table gives to each token id."""

    num_fused_shared_experts = 0

    def __init__(
        self, config: DeepseekV4Config, hashed: bool, quant_config: QuantConfig | None, prefix: str,
        overlap: StreamOverlap,
    ) -> None:  # fmt: skip
        super().__init__()
        self.overlap = overlap
        self._tp = get_tp_group()
        hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        top_k, limit = config.num_experts_per_tok, config.swiglu_limit
        self.gate = MoEGate(hidden, experts, with_bias=not hashed)
        rule = Routing(top_k, SCORING, renormalize=True, scale=config.routed_scaling_factor)
        self.topk: TopK | HashTopK
        if hashed:
            self.topk = HashTopK(config.vocab_size, experts, rule)
        else:
            self.topk = TopK(rule, self.gate.e_score_correction_bias)
        # Both parts stay partial sums of this rank; the block reduces once.
        self.experts = make_experts(
            experts, hidden, width, top_k, quant_config, f"{prefix}.experts", swiglu_limit=limit
        )  # fmt: skip
        self.shared_experts = GatedMLP(
            hidden, config.n_shared_experts * width, False, quant_config, f"{prefix}.shared_experts",
            limit if config.shared_expert_swiglu_limit else None,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """x [N, H], input_ids [N] -> [N, H]."""
        shared, routed = self.overlap.fork_join(
            lambda: self.shared_experts(x),
            lambda: self.experts(x, self._route(x, input_ids), forward_batch),
            x.shape[0],
        )
        return self._tp.all_reduce(routed + shared)

    def _route(self, x: torch.Tensor, input_ids: torch.Tensor) -> TopKOutput:
        logits = self.gate(x)
        if isinstance(self.topk, HashTopK):
            return self.topk(logits, input_ids)
        return self.topk(logits)
