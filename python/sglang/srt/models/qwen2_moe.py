"""The MoE block of the Qwen models: routed experts and a gated shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.kernels.ops.moe.add_gated_shared import add_gated_shared
from sglang.kernels.ops.moe.topk import Routing
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.gated_mlp import GatedMLP
from sglang.srt.layers.layernorm import RoutedRows
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.ep_moe.factory import make_experts
from sglang.srt.layers.moe.fused_shared_experts import FusedSharedExperts, shared_slots
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.weights import join_rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.multi_stream_utils import UNRESTRICTED, OverlapSite, StreamOverlap


class Qwen2MoeSparseMoeBlock(nn.Module):
    """``sum_j w_j expert_j(x) + sigmoid(shared_expert_gate x) * shared_expert(x)``.

    Weights w are softmax over all experts, the ``num_experts_per_tok`` largest, renormalised. quant_config and prefix
    decide the format of the experts' weights; the two gates are never quantised. With ``support_shared_expert_fusion``
    the shared expert is in ``num_fused_shared_experts`` slots of the routed ones' weights, and a step whose size
    ``site`` fuses computes it as one of them; the caller vouches that it can (``SharedExperts.fusion_refusal``).
    """

    def __init__(
        self,
        layer_id: int,
        config: Qwen3_5Config,
        quant_config: QuantConfig | None = None,
        alt_stream: torch.cuda.Stream | None = None,
        prefix: str = "",
        is_nextn: bool = False,
        support_shared_expert_fusion: bool = False,
        site: OverlapSite = UNRESTRICTED,
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.prefix = prefix
        self.is_nextn = is_nextn
        self.support_shared_expert_fusion = support_shared_expert_fusion
        self.num_fused_shared_experts = config.shared_experts.num_slots if support_shared_expert_fusion else 0
        self._tp = get_tp_group()
        self.overlap = StreamOverlap(alt_stream, site)
        hidden_size = config.hidden_size
        self.gate = ReplicatedLinear(hidden_size, config.num_experts)
        slots = shared_slots(self.num_fused_shared_experts, gated=True)
        rule = Routing(config.num_experts_per_tok, "softmax", config.norm_topk_prob)
        self.topk = TopK(rule, shared=slots)
        # Both parts stay partial sums of this rank; the block reduces once.
        self.experts = make_experts(
            config.num_experts, hidden_size, config.moe_intermediate_size, config.num_experts_per_tok, quant_config,
            f"{prefix}.experts", self.num_fused_shared_experts,
        )  # fmt: skip
        self.shared_expert_gate = ReplicatedLinear(hidden_size, 1)
        self.shared_expert: GatedMLP | FusedSharedExperts
        if self.num_fused_shared_experts:
            self.shared_expert = FusedSharedExperts(self.experts)
            self._gates = join_rows(self.gate.weight, self.shared_expert_gate.weight)
        else:
            self.shared_expert = GatedMLP(
                hidden_size, config.shared_expert_intermediate_size, False, quant_config, f"{prefix}.shared_expert"
            )

    def extra_repr(self) -> str:
        return f"layer_id={self.layer_id}, prefix={self.prefix!r}, is_nextn={self.is_nextn}"

    @property
    def router_weight(self) -> torch.Tensor:
        """[>= E, H]; further rows are the shared expert's gate, and zeros."""
        return self._gates if self.num_fused_shared_experts else self.gate.weight

    @property
    def logits_dtype(self) -> torch.dtype:
        """That of rows."""
        return self.gate.weight.dtype

    def forward(self, hidden: torch.Tensor | RoutedRows, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden [N, H] -> [N, H]."""
        x, logits = hidden if isinstance(hidden, RoutedRows) else (hidden, None)
        slotted = self.shared_expert
        if isinstance(slotted, FusedSharedExperts) and slotted.is_fused(self.overlap.site, x.shape[0]):
            logits = F.linear(x, self._gates) if logits is None else logits
            chosen = self.topk(logits[:, : self.gate.weight.shape[0] + 1], fused=True)
            return self._tp.all_reduce(self.experts(x, chosen, forward_batch))
        shared, routed = self.overlap.fork_join(
            lambda: self.shared_expert(x),
            lambda: self._forward_router_experts(x, logits, forward_batch),
            num_tokens=x.shape[0],
        )
        # Every rank holds the whole gate, and gates its part of the sum.
        return self._tp.all_reduce(add_gated_shared(routed, shared, x, self.shared_expert_gate.weight))

    def _forward_router_experts(
        self, x: torch.Tensor, logits: torch.Tensor | None, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        logits = self.gate(x) if logits is None else logits[:, : self.gate.weight.shape[0]]
        return self.experts(x, self.topk(logits), forward_batch)
