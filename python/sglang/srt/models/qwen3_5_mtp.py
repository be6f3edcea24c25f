"""The MTP layer of Qwen3.5 as a draft model: one layer of gated softmax attention, dense or MoE like the target's."""

from __future__ import annotations

from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.qwen3_5 import FULL_ATTENTION, Qwen3_5Config
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.moe.fused_shared_experts import can_fuse
from sglang.srt.models.draft_model import DraftModel, DraftParts, named
from sglang.srt.models.qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5ForConditionalGeneration,
    configure_streams,
    make_rotary_embedding,
)


class Qwen3_5ForCausalLMMTP(DraftModel):
    """Tensors ``mtp.*``; KV goes to layer ``layer_id``. It has no recurrent state."""

    packed_modules = Qwen3_5ForConditionalGeneration.packed_modules

    def __init__(
        self,
        config: ModelConfig,
        target: Qwen3_5ForConditionalGeneration,
        layer_id: int,
        streams: StreamPlan = NO_OVERLAP,
    ) -> None:
        configure_streams(streams)
        super().__init__(config, target, layer_id, streams)
        text = config.text
        assert isinstance(text, Qwen3_5Config)
        layer = Qwen3_5DecoderLayer(
            text,
            layer_id,
            FULL_ATTENTION,
            make_rotary_embedding(config),
            target.side_stream,
            config.quant_config,
            can_fuse(text.mtp_shared_experts, config.quant_config),
            "mtp.layers.0",
        )
        parts = DraftParts.of(layer, config, GemmaRMSNorm)
        self.mtp = named(
            fc=parts.projection,
            pre_fc_norm_embedding=parts.embed_norm,
            pre_fc_norm_hidden=parts.hidden_norm,
            layers=nn.ModuleList([layer]),
            norm=parts.final_norm,
        )
        self.set_parts(parts)

    @staticmethod
    def checkpoint_prefix(config: ModelConfig) -> str:
        return "mtp."

    def checkpoint_name(self, name: str) -> str | None:
        return name if name.startswith("mtp.") else None


EntryClass = [Qwen3_5ForCausalLMMTP]
