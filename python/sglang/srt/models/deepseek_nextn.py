"""The MTP layer of DeepSeek V3 and R1 as a draft model: the checkpoint's layer past the last one."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.moe.fused_shared_experts import can_fuse
from sglang.srt.models.deepseek_v2 import (
    SHARED_EXPERTS,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    make_rotary_embedding,
)
from sglang.srt.models.draft_model import DraftModel, DraftParts, named
from sglang.srt.utils.multi_stream_utils import StreamOverlap

# The checkpoint's copies of the target's embedding and head.
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


class DeepseekV3ForCausalLMNextN(DraftModel):
    """Tensors ``model.layers.<L>.*`` where L is the number of the target's layers; KV goes to layer ``layer_id``."""

    packed_modules = DeepseekV2ForCausalLM.packed_modules

    def __init__(
        self, config: ModelConfig, target: DeepseekV2ForCausalLM, layer_id: int, streams: StreamPlan = NO_OVERLAP
    ) -> None:
        super().__init__(config, target, layer_id, streams)
        text = config.text
        assert isinstance(text, DeepseekConfig)
        self._prefix = self.checkpoint_prefix(config)
        # It has experts wherever the model's dense layers stand.
        everywhere = replace(text, first_k_dense_replace=0, moe_layer_freq=1)
        layer = DeepseekV2DecoderLayer(
            everywhere,
            layer_id,
            make_rotary_embedding(config),
            StreamOverlap(target.side_stream, streams.site(SHARED_EXPERTS)),
            config.quant_config,
            can_fuse(text.mtp_shared_experts, config.quant_config),
            self._prefix.removesuffix("."),
        )
        parts = DraftParts.of(layer, config, RMSNorm)
        layer.enorm, layer.hnorm, layer.eh_proj = parts.embed_norm, parts.hidden_norm, parts.projection
        layer.shared_head = named(norm=parts.final_norm)
        self.model = named(layers=nn.ModuleDict({str(text.num_hidden_layers): layer}))
        self.set_parts(parts)

    @staticmethod
    def checkpoint_prefix(config: ModelConfig) -> str:
        return f"model.layers.{config.num_hidden_layers}."

    def checkpoint_name(self, name: str) -> str | None:
        """The layer's own tensors; copies of the target's and derived ones are not taken."""
        if not name.startswith(self._prefix) or name.endswith("rotary_emb.inv_freq"):
            return None
        return None if name.removeprefix(self._prefix) in _COPIES else name

    def post_load_weights(self) -> None:
        assert self._parts is not None and isinstance(self._parts.layer, DeepseekV2DecoderLayer)
        self._parts.layer.self_attn.split_kv_b()


EntryClass = [DeepseekV3ForCausalLMNextN]
