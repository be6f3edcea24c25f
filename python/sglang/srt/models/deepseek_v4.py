"""DeepSeek V4: hyper-connected residual streams over window and compressed attention, and clamped experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from sglang.kernels.ops.mhc.hc_head import hc_head
from sglang.kernels.ops.mhc.hc_post import hc_post
from sglang.kernels.ops.mhc.hc_pre import hc_pre
from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.configs.rope import RopeConfig
from sglang.srt.layers.attention.base_attn_backend import CompressedBackend, backend_of
from sglang.srt.layers.layernorm import Float32RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import make_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import Backbone, CausalLM
from sglang.srt.models.deepseek_common.amd.deepseek_v4_fused_mhc import max_fused_rows, try_fused_hc_post_pre
from sglang.srt.models.deepseek_common.v4_attention import DeepseekV4Attention
from sglang.srt.models.deepseek_common.v4_moe import DeepseekV4MoE
from sglang.srt.models.deepseek_common.v4_names import deepseek_v4_name
from sglang.srt.utils.multi_stream_utils import StreamOverlap

COMPRESSION, SHARED_EXPERTS = "deepseek_v4.compression", "deepseek.shared_experts"


class HyperMix(nn.Module):
    """fn [m, n * D], base [m] and scale [s] in float32: how ``m`` coefficients follow from a token's n streams."""

    def __init__(self, config: DeepseekV4Config, num_coefficients: int, num_scales: int) -> None:
        super().__init__()
        self.rms_eps, self.hc_eps, self.iterations = config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters
        self.fn = make_parameter(num_coefficients, config.hc_mult * config.hidden_size, dtype=torch.float32)
        self.base = make_parameter(num_coefficients, dtype=torch.float32, fill=(0.0, 0.1))
        self.scale = make_parameter(num_scales, dtype=torch.float32, fill=(1.0, 0.1))


class HyperStreams(NamedTuple):
    """A token's streams [N, n, D], and what of the last sub-block they have still to take in, if anything.

    The row [N, D] that it gave, and post and comb: the way out of it waits for the way into the next.
    """

    streams: torch.Tensor
    way_out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def joined(self) -> torch.Tensor:
        """The streams [N, n, D] with nothing left out."""
        if self.way_out is None:
            return self.streams
        row, post, comb = self.way_out
        joined: torch.Tensor = hc_post(row, self.streams, post, comb)
        return joined


class HyperConnection(HyperMix):
    """What leads from the streams into a sub-block and out again. mHC (Xie et al. 2026)."""

    def __init__(self, config: DeepseekV4Config) -> None:
        n = config.hc_mult
        super().__init__(config, (2 + n) * n, 3)
        self.max_fused_rows = max_fused_rows()

    def forward(
        self, x: HyperStreams, norm: Float32RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sub-block's input [N, D], normed; the streams [N, n, D] that it meets; post and comb of its way out."""
        mix = (self.fn, self.base, self.scale, self.rms_eps, self.hc_eps, self.iterations)
        if x.way_out is not None:
            row, post, comb = x.way_out
            fused = try_fused_hc_post_pre(
                row, x.streams, post, comb, *mix, norm.weight, norm.eps, max_rows=self.max_fused_rows
            )
            if fused is not None:
                streams, row, post, comb, norm_fused = fused
                return (row if norm_fused else norm(row)), streams, post, comb
        streams = x.joined()
        row, post, comb = hc_pre(streams, *mix)
        return norm(row), streams, post, comb


class HyperHead(HyperMix):
    """The row of a token's streams that the output head reads."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config, config.hc_mult, 1)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        """streams [N, n, D] -> [N, D]."""
        return hc_head(streams, self.fn, self.base, self.scale, self.rms_eps, self.hc_eps)


class DeepseekV4DecoderLayer(nn.Module):
    """Attention and experts, each between the two ways of its hyper-connection."""

    is_moe = True

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantConfig | None = None,
        compression: StreamOverlap | None = None,
        shared_experts: StreamOverlap | None = None,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{layer_id}"
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)
        self.input_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DeepseekV4Attention(
            config, layer_id, rotary_emb, quant_config, f"{prefix}.self_attn", compression or StreamOverlap()
        )
        hashed, overlap = config.hash_layers[layer_id], shared_experts or StreamOverlap()
        self.mlp = DeepseekV4MoE(config, hashed, quant_config, f"{prefix}.mlp", overlap)

    def forward(
        self, positions: torch.Tensor, x: HyperStreams, input_ids: torch.Tensor, forward_batch: ForwardBatch
    ) -> HyperStreams:
        """positions [N], input_ids [N]; the way out of the experts is left to what follows."""
        row, streams, post, comb = self.hc_attn(x, self.input_layernorm)
        x = HyperStreams(streams, (self.self_attn(row, positions, forward_batch), post, comb))
        row, streams, post, comb = self.hc_ffn(x, self.post_attention_layernorm)
        return HyperStreams(streams, (self.mlp(row, input_ids, forward_batch), post, comb))


class DeepseekV4Model(Backbone):
    """The backbone: every token as ``hc_mult`` streams between the layers.

    Its two tables of angles, ``rotary_emb`` for layers without compression and ``compress_rotary_emb`` for those with
    it, are buffers of modules that it owns; layers hold them by reference. On ``alt_stream`` entries may be pooled and
    selected while queries are computed, and the shared expert overlap the routed ones.
    """

    def __init__(
        self, config: ModelConfig, alt_stream: torch.cuda.Stream | None = None, streams: StreamPlan = NO_OVERLAP
    ) -> None:
        text = config.text
        assert isinstance(text, DeepseekV4Config)
        ropes = [
            _freqs_cis_to_cos_sin(rope, text.qk_rope_head_dim, config.num_positions)
            for rope in (text.rope, text.compress_rope)
        ]
        overlaps = [StreamOverlap(alt_stream, streams.site(name)) for name in (COMPRESSION, SHARED_EXPERTS)]
        layers = (
            DeepseekV4DecoderLayer(text, layer_id, ropes[ratio > 0], config.quant_config, *overlaps)
            for layer_id, ratio in enumerate(text.compress_ratios)
        )
        super().__init__(text, Float32RMSNorm, layers)
        self.rotary_emb, self.compress_rotary_emb = ropes
        self.hc_mult = text.hc_mult
        self.hc_head = HyperHead(text)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """input_ids [N], positions [N] -> [N, H]."""
        return self.final_rows(self.streams(input_ids, positions, forward_batch))

    def streams(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """What the last layer leaves: [N, n, D]."""
        backend_of(forward_batch, CompressedBackend).complete_plan(forward_batch)
        x = HyperStreams(self.embed_tokens(input_ids).unsqueeze(1).expand(-1, self.hc_mult, -1))
        for layer in self.layers:
            x = layer(positions, x, input_ids, forward_batch)
        return x.joined()

    def final_rows(self, streams: torch.Tensor) -> torch.Tensor:
        """Streams [N, n, D] -> the rows of the output head [N, D]."""
        rows: torch.Tensor = self.norm(self.hc_head(streams))
        return rows


def _freqs_cis_to_cos_sin(rope: RopeConfig, width: int, num_positions: int) -> RotaryEmbedding:
    """Cosines and sines of every position's angles, derived once: a buffer of the module, with which it goes."""
    return RotaryEmbedding(width, num_positions, rope.theta, False, rope)


class DeepseekV4ForCausalLM(CausalLM):
    """Backbone and output head; loads the published layout, and what transformers saves."""

    packed_modules = {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
        "fused_wqa_wkv": (("wq_a", 0), ("wkv", 1)),
        "wkv_gate": (("wkv", 0), ("wgate", 1)),
    }

    def __init__(self, config: ModelConfig, streams: StreamPlan = NO_OVERLAP) -> None:
        side_stream = streams.side_stream(COMPRESSION, SHARED_EXPERTS)
        super().__init__(config.text, DeepseekV4Model(config, side_stream, streams), side_stream)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """As the base class; ``hidden_states`` are all streams, [N, n * D], from which the MTP layer drafts."""
        assert isinstance(self.model, DeepseekV4Model)
        streams = self.model.streams(input_ids, positions, forward_batch)
        out: LogitsProcessorOutput = self.logits_processor(self.model.final_rows(streams), self.lm_head, forward_batch)
        if out.hidden_states is not None:
            out.hidden_states = streams.flatten(1)
        return out

    def checkpoint_name(self, name: str) -> str | None:
        """Tensors of layers that draft are not taken either."""
        own = deepseek_v4_name(name)
        return None if own is None else super().checkpoint_name(own)


EntryClass = DeepseekV4ForCausalLM
