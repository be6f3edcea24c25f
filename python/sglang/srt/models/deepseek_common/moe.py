"""The MoE block of DeepSeek: the router, routed experts and shared experts."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.moe.router_logits import router_logits
from sglang.kernels.ops.moe.topk import NO_SHARED, Routing, SharedSlots
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.gated_mlp import GatedMLP
from sglang.srt.layers.layernorm import RoutedRows
from sglang.srt.layers.moe.ep_moe.factory import make_experts
from sglang.srt.layers.moe.fused_shared_experts import FusedSharedExperts, shared_slots
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization import Rows, plain_rows
from sglang.srt.layers.weights import make_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.utils.multi_stream_utils import StreamOverlap


class MoEGate(nn.Module):
    """Router logits in float32, and V3's correction bias."""

    def __init__(self, hidden: int, num_experts: int, with_bias: bool) -> None:
        super().__init__()
        self.weight = make_parameter(num_experts, hidden)
        self.e_score_correction_bias: nn.Parameter | None = None
        if with_bias:
            self.e_score_correction_bias = make_parameter(num_experts, dtype=torch.float32, fill=(0.0, 0.05))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, H] -> logits [N, E] float32."""
        return router_logits(x, self.weight)


class DeepseekV2MoE(nn.Module):
    """Routed experts plus the shared experts, which are one MLP of n_shared_experts times the expert width.

    fuse_shared: they are stored as routed experts (the caller has checked that they can be), and a step whose size
    ``overlap.site`` fuses computes them as such.
    """

    logits_dtype = torch.float32

    def __init__(
        self,
        config: DeepseekConfig,
        overlap: StreamOverlap,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
        fuse_shared: bool = False,
    ) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self._tp = get_tp_group()
        self.overlap = overlap
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = MoEGate(hidden, config.n_routed_experts, with_bias=config.topk_method == "noaux_tc")
        self.num_fused_shared_experts = config.n_shared_experts if fuse_shared else 0
        slots = shared_slots(self.num_fused_shared_experts)
        self.topk = make_topk(config, self.gate.e_score_correction_bias, slots)
        # Both parts are partial sums of this rank; the block reduces once.
        self.experts = make_experts(
            config.n_routed_experts, hidden, width, config.num_experts_per_tok, quant_config, f"{prefix}.experts",
            self.num_fused_shared_experts,
        )  # fmt: skip
        self.shared_experts: GatedMLP | FusedSharedExperts | None = None
        if self.num_fused_shared_experts:
            self.shared_experts = FusedSharedExperts(self.experts)
        elif config.n_shared_experts:
            self.shared_experts = GatedMLP(
                hidden, config.n_shared_experts * width, False, quant_config, f"{prefix}.shared_experts"
            )

    @property
    def row_dtype(self) -> torch.dtype | None:
        """As a linear layer's."""
        return self.experts.row_dtype

    @property
    def router_weight(self) -> torch.Tensor:
        """[E, H]."""
        return self.gate.weight

    def forward(self, hidden: Rows | RoutedRows, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden [N, H] -> [N, H]."""
        x, logits = hidden if isinstance(hidden, RoutedRows) else (hidden, None)
        shared_experts = self.shared_experts
        if shared_experts is None:
            return self._tp.all_reduce(self._routed(x, logits, forward_batch))
        if isinstance(shared_experts, FusedSharedExperts) and shared_experts.is_fused(self.overlap.site, x.shape[0]):
            return self._tp.all_reduce(self._routed(x, logits, forward_batch, fused=True))
        shared, routed = self.overlap.fork_join(
            lambda: shared_experts(x), lambda: self._routed(x, logits, forward_batch), num_tokens=x.shape[0]
        )
        return self._tp.all_reduce(routed + shared)

    def _routed(
        self, x: Rows, logits: torch.Tensor | None, forward_batch: ForwardBatch, fused: bool = False
    ) -> torch.Tensor:
        logits = self.gate(plain_rows(x)) if logits is None else logits
        return self.experts(x, self.topk(logits, fused), forward_batch)


def make_topk(config: DeepseekConfig, correction_bias: torch.Tensor | None, shared: SharedSlots = NO_SHARED) -> TopK:
    """The router of ``topk_method``: greedy (V2-Lite), group_limited_greedy (V2) or noaux_tc (V3)."""
    grouped = config.topk_method != "greedy"
    rule = Routing(
        config.num_experts_per_tok,
        config.scoring_func,
        # V2's softmax weights are not renormalised by either published implementation unless the config says so.
        config.norm_topk_prob,
        n_group=config.n_group if grouped else 1,
        topk_group=config.topk_group if grouped else 1,
        scale=config.routed_scaling_factor,
    )
    return TopK(rule, correction_bias, shared)
