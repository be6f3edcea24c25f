"""DeepSeek V2, V2-Lite, V3 and R1: latent attention, routed and shared experts."""

from __future__ import annotations

import re

import torch
from torch import nn

from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.moe.slotted_mlp import can_fuse
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.checkpoint_model import CheckpointModel
from sglang.srt.models.deepseek_common.attention import DeepseekV2AttentionMLA
from sglang.srt.models.deepseek_common.moe import DeepseekV2MLP, DeepseekV2MoE
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils.multi_stream_utils import UNPLANNED, OverlapSite, StreamOverlap
from sglang.srt.utils.stream_policy import SERIAL_PLAN, StreamPlan

SHARED_EXPERTS = "deepseek.shared_experts"

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")


class DeepseekV2DecoderLayer(nn.Module):
    """Attention and feed-forward with the residual carried beside the hidden state."""

    def __init__(
        self,
        config: DeepseekConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        overlap: StreamOverlap,
        quant_config: QuantConfig | None = None,
        fuse_shared: bool = False,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{layer_id}"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DeepseekV2AttentionMLA(config, layer_id, rotary_emb, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer_id)
        self.mlp: nn.Module
        if self.is_moe:
            self.mlp = DeepseekV2MoE(config, overlap, quant_config, f"{prefix}.mlp", fuse_shared)
        else:
            self.mlp = DeepseekV2MLP(
                config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.mlp"
            )

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, fb: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, H] is what the layer before added, residual [N, H] the sum before it (None at the first layer)."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, positions, fb)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden, fb) if self.is_moe else self.mlp(hidden), residual


class DeepseekV2Model(nn.Module):
    """The backbone: token ids to normed hidden rows; on ``alt_stream`` shared experts may run beside routed ones."""

    def __init__(
        self, config: ModelConfig, alt_stream: torch.cuda.Stream | None = None, site: OverlapSite = UNPLANNED
    ) -> None:
        super().__init__()
        text = config.text
        assert isinstance(text, DeepseekConfig)
        overlap = StreamOverlap(alt_stream, site)
        fuse_shared = can_fuse(config) and not get_global_server_args().disable_shared_experts_fusion
        rotary_emb = RotaryEmbedding(
            text.qk_rope_head_dim, config.context_len, text.rope.theta, not text.rope_interleave, text.rope
        )
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(text, layer_id, rotary_emb, overlap, config.quant_config, fuse_shared)
            for layer_id in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, fb: ForwardBatch) -> torch.Tensor:
        """input_ids [N], positions [N] -> [N, H]."""
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, fb)
        return self.norm(hidden, residual)[0]


class DeepseekV2ForCausalLM(CheckpointModel):
    """Backbone and output head; loads V2 and V3 checkpoints in their published layout."""

    packed_modules = {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
        "fused_qkv_a_proj_with_mqa": (("q_a_proj", 0), ("kv_a_proj_with_mqa", 1)),
    }

    def __init__(self, config: ModelConfig, streams: StreamPlan = SERIAL_PLAN) -> None:
        super().__init__()
        text = config.text
        assert isinstance(text, DeepseekConfig)
        self.num_hidden_layers = text.num_hidden_layers
        self.tied = text.tie_word_embeddings
        self.model = DeepseekV2Model(config, streams.side_stream(SHARED_EXPERTS), streams.site(SHARED_EXPERTS))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size)
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.logits_processor = LogitsProcessor(text.vocab_size)
        blocks = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, DeepseekV2MoE)]
        self.num_fused_shared_experts = blocks[0].num_fused_shared_experts if blocks else 0

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, fb: ForwardBatch) -> LogitsProcessorOutput:
        """input_ids [N], positions [N] -> logits of each request's last row."""
        hidden = self.model(input_ids, positions, fb)
        return self.logits_processor(hidden, self.lm_head, fb)

    def checkpoint_name(self, name: str) -> str | None:
        """Layers past the last one (the NextN head, or what an override cut off) and derived tensors are not taken."""
        layer = _LAYER_NAME.match(name)
        if layer is not None and int(layer.group(1)) >= self.num_hidden_layers:
            return None
        if name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight"):
            return None
        return name

    def post_load(self) -> None:
        for module in self.modules():
            if isinstance(module, DeepseekV2AttentionMLA):
                module.split_kv_b()


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """V3 and R1 differ from V2 by configuration alone."""


EntryClass = [DeepseekV2ForCausalLM, DeepseekV3ForCausalLM]
