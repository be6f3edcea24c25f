"""DeepSeek V2, V2-Lite, V3 and R1: latent attention, routed and shared experts."""

from __future__ import annotations

import torch

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.gated_mlp import GatedMLP
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.moe.fused_shared_experts import can_fuse
from sglang.srt.layers.quantization import ProjectedRows, Rows
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import Backbone, CausalLM, DecoderLayer
from sglang.srt.models.deepseek_common.attention import DeepseekV2AttentionMLA
from sglang.srt.models.deepseek_common.moe import DeepseekV2MoE
from sglang.srt.utils.multi_stream_utils import UNRESTRICTED, OverlapSite, StreamOverlap

SHARED_EXPERTS = "deepseek.shared_experts"


class DeepseekV2DecoderLayer(DecoderLayer):
    """Latent attention, and a dense or MoE feed-forward."""

    def __init__(
        self,
        config: DeepseekConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        overlap: StreamOverlap,
        quant_config: QuantConfig | None = None,
        fuse_shared: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(config, RMSNorm)
        prefix = prefix or f"model.layers.{layer_id}"
        self.self_attn = DeepseekV2AttentionMLA(config, layer_id, rotary_emb, quant_config, f"{prefix}.self_attn")
        self.is_moe = config.is_moe_layer(layer_id)
        if self.is_moe:
            self.mlp = DeepseekV2MoE(config, overlap, quant_config, f"{prefix}.mlp", fuse_shared)
        else:
            self.mlp = GatedMLP(
                config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.mlp"
            )
        self.input_layernorm.quantize_for(self.self_attn)
        self.input_layernorm.project_for(self.self_attn)
        self.post_attention_layernorm.quantize_for(self.mlp)
        if isinstance(self.mlp, DeepseekV2MoE):
            self.post_attention_layernorm.route_for(self.mlp)

    def mix(self, positions: torch.Tensor, hidden: Rows | ProjectedRows, forward_batch: ForwardBatch) -> torch.Tensor:
        return self.self_attn(hidden, positions, forward_batch)


def make_rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    """The rotation of the rope part of queries and keys, for every position of the context."""
    text = config.text
    assert isinstance(text, DeepseekConfig)
    return RotaryEmbedding(
        text.qk_rope_head_dim, config.num_positions, text.rope.theta, not text.rope_interleave, text.rope
    )


class DeepseekV2Model(Backbone):
    """The backbone; on ``alt_stream`` shared experts may overlap routed experts."""

    def __init__(
        self, config: ModelConfig, alt_stream: torch.cuda.Stream | None = None, site: OverlapSite = UNRESTRICTED
    ) -> None:
        text = config.text
        assert isinstance(text, DeepseekConfig)
        overlap = StreamOverlap(alt_stream, site)
        fuse_shared = can_fuse(text.shared_experts, config.quant_config)
        rotary_emb = make_rotary_embedding(config)
        layers = (
            DeepseekV2DecoderLayer(text, layer_id, rotary_emb, overlap, config.quant_config, fuse_shared)
            for layer_id in range(text.num_hidden_layers)
        )
        super().__init__(text, RMSNorm, layers)


class DeepseekV2ForCausalLM(CausalLM):
    """Backbone and output head; loads V2 and V3 checkpoints in their published layout."""

    packed_modules = {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
        "fused_qkv_a_proj_with_mqa": (("q_a_proj", 0), ("kv_a_proj_with_mqa", 1)),
    }

    def __init__(self, config: ModelConfig, streams: StreamPlan = NO_OVERLAP) -> None:
        side_stream = streams.side_stream(SHARED_EXPERTS)
        super().__init__(config.text, DeepseekV2Model(config, side_stream, streams.site(SHARED_EXPERTS)), side_stream)

    def checkpoint_name(self, name: str) -> str | None:
        """Derived tensors are ignored too."""
        return None if name.endswith("rotary_emb.inv_freq") else super().checkpoint_name(name)

    def post_load_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, DeepseekV2AttentionMLA):
                module.split_kv_b()


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """V3 and R1 differ from V2 only by configuration."""


EntryClass = [DeepseekV2ForCausalLM, DeepseekV3ForCausalLM]
