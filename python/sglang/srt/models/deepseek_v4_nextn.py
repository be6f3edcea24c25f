"""The MTP layer of DeepSeek V4 as a draft model: one more layer over the target's residual streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.layernorm import Float32RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_common.v4_names import deepseek_v4_name
from sglang.srt.models.deepseek_v4 import (
    SHARED_EXPERTS,
    DeepseekV4DecoderLayer,
    DeepseekV4ForCausalLM,
    DeepseekV4Model,
    HyperHead,
    HyperStreams,
)
from sglang.srt.models.draft_model import DraftModel, named
from sglang.srt.utils.multi_stream_utils import StreamOverlap

_PREFIX = "mtp.0."
# The checkpoint's copies of the target's embedding and head.
_COPIES = ("emb.", "head.")
_INPUTS = ("enorm.", "hnorm.", "e_proj.", "h_proj.")


class DeepseekV4ForCausalLMNextN(DraftModel):
    """``head(norm(hc_head(layer(W_h norm_h(X) + W_e norm_e(embed(token))))))`` over streams X [n, D] of each row.

    A row pairs a token with the streams of the token before it: the target's, before they are joined, or the draft's
    own. The layer has no compressed entries and no hash routing. Tensors ``mtp.0.*``; KV goes to layer ``layer_id``.
    DeepSeek's inference code (MTPBlock).
    """

    packed_modules = DeepseekV4ForCausalLM.packed_modules

    def __init__(
        self, config: ModelConfig, target: DeepseekV4ForCausalLM, layer_id: int, streams: StreamPlan = NO_OVERLAP
    ) -> None:
        super().__init__(config, target, layer_id, streams)
        text = config.text
        assert isinstance(text, DeepseekV4Config) and isinstance(target.model, DeepseekV4Model)
        hidden, eps, quant = text.hidden_size, text.rms_norm_eps, config.quant_config
        self.hc_mult, self.hidden_width = text.hc_mult, text.hc_mult * hidden
        one_more = replace(text, compress_ratios=(*text.compress_ratios, 0), hash_layers=(*text.hash_layers, False))
        shared = StreamOverlap(target.side_stream, streams.site(SHARED_EXPERTS))
        layer = DeepseekV4DecoderLayer(one_more, layer_id, target.model.rotary_emb, quant, shared_experts=shared)
        self.model = named(
            enorm=Float32RMSNorm(hidden, eps),
            hnorm=Float32RMSNorm(hidden, eps),
            e_proj=ReplicatedLinear(hidden, hidden, quant_config=quant, dequantize=True),
            h_proj=ReplicatedLinear(hidden, hidden, quant_config=quant, dequantize=True),
            layers=nn.ModuleList([layer]),
            hc_head=HyperHead(text),
            norm=Float32RMSNorm(hidden, eps),
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch, hidden: torch.Tensor
    ) -> LogitsProcessorOutput:
        """input_ids [N], positions [N], hidden [N, n * D] -> logits of the wanted rows, and streams [N, n * D]."""
        embed_tokens, lm_head = self._shared
        m = self.model
        embedded = m.e_proj(m.enorm(embed_tokens(input_ids)))
        streams = m.h_proj(m.hnorm(hidden.unflatten(1, (self.hc_mult, -1)))) + embedded.unsqueeze(1)
        (layer,) = m.layers
        streams = layer(positions, HyperStreams(streams), input_ids, forward_batch).joined()
        output: LogitsProcessorOutput = self.logits_processor(m.norm(m.hc_head(streams)), lm_head, forward_batch)
        output.hidden_states = streams.flatten(1)
        return output

    @staticmethod
    def checkpoint_prefix(config: ModelConfig) -> str:
        return _PREFIX

    def checkpoint_name(self, name: str) -> str | None:
        """The layer's own tensors; copies of the target's are not taken, and what else is named mtp does not fit."""
        if not name.startswith("mtp."):
            return None
        if not name.startswith(_PREFIX):
            return name
        rest = name.removeprefix(_PREFIX)
        if rest.startswith(_COPIES):
            return None
        if rest.startswith(_INPUTS):
            return f"model.{rest}".replace(".scale", ".weight_scale_inv")
        return deepseek_v4_name(rest if rest.startswith(("norm.", "hc_head_")) else f"layers.0.{rest}")

    def _describe(self, problems: Mapping[str, set[str]]) -> str:
        return (
            f"{super()._describe(problems)}\n  DeepSeek V4 drafts by one serial MTP layer, mtp.0. Blocks of another "
            "kind under mtp.* (DSpark) are not served: drop --speculative-algorithm, without which they are ignored"
        )


EntryClass = [DeepseekV4ForCausalLMNextN]
