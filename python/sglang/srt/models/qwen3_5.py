"""Qwen3.5 text models, dense and MoE: three gated-delta-net layers to one of gated softmax attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.configs.qwen3_5 import LINEAR_ATTENTION, Qwen3_5Config
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import backend_of
from sglang.srt.layers.attention.hybrid_linear_attn_backend import GDNBackend
from sglang.srt.layers.attention.pool_backend import GqaBackend
from sglang.srt.layers.gated_mlp import GatedMLP
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNormGated
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_shared_experts import can_fuse
from sglang.srt.layers.quantization import ProjectedRows
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import ShardId, check_shape, join_rows, make_parameter, make_split_vector
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import Backbone, CausalLM, DecoderLayer
from sglang.srt.models.qwen2_moe import Qwen2MoeSparseMoeBlock
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils.multi_stream_utils import StreamOverlap

# Steps of this many tokens or more keep the GPU busy without a second stream.
DUAL_STREAM_TOKEN_THRESHOLD = 1024
# Places that may overlap.
SHARED_EXPERTS, GDN_QKVZ_BA, QK_NORM = "qwen3_5.shared_experts", "qwen3_5.gdn_qkvz_ba", "qwen3_5.qk_norm"

# Shared experts overlapping routed ones: on HIP, and elsewhere. The other switches hold for every platform.
_hip_use_alt_stream = False
_cuda_use_alt_stream = False
_gdn_use_alt_stream = False
_qknorm_use_alt_stream = False
_streams = NO_OVERLAP


def configure_streams(policy: StreamPlan) -> None:
    """Set the module's stream switches; layers copy them when they are built."""
    global _hip_use_alt_stream, _cuda_use_alt_stream, _gdn_use_alt_stream, _qknorm_use_alt_stream, _streams
    is_hip = current_platform.kind == "hip"
    _hip_use_alt_stream = is_hip and policy.site(SHARED_EXPERTS).enabled
    _cuda_use_alt_stream = not is_hip and policy.site(SHARED_EXPERTS).enabled
    _gdn_use_alt_stream = policy.site(GDN_QKVZ_BA).enabled
    _qknorm_use_alt_stream = policy.site(QK_NORM).enabled
    _streams = policy


def _disable_shared_experts_fusion() -> bool:
    """What ``--disable-shared-experts-fusion`` resolved to; read when a model is built, not when this is imported."""
    return get_global_server_args().disable_shared_experts_fusion


class Qwen3_5Conv1d(nn.Module):
    """Weight [C, 1, W] of the depthwise convolution over q | k | v, each block split over ranks separately."""

    def __init__(self, block_widths: Iterable[int], kernel_size: int) -> None:
        super().__init__()
        self._tp = get_tp_group()
        self._widths = [width // self._tp.size for width in block_widths]
        channels = sum(self._widths)
        self._full_shape = (channels * self._tp.size, 1, kernel_size)
        self.weight = make_parameter(
            channels, 1, kernel_size, loader=self.weight_loader, full_shapes={None: self._full_shape}
        )

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's channels of each block."""
        check_shape(loaded, self._full_shape)
        blocks = loaded.split([width * self._tp.size for width in self._widths])
        own = [block.narrow(0, self._tp.rank * width, width) for block, width in zip(blocks, self._widths, strict=True)]
        param.data.copy_(torch.cat(own))


class Qwen3_5GatedDeltaNet(nn.Module):
    """Linear attention whose state [V, K] a head decays, forgets and writes by the gated delta rule.

    Checkpoint rows are whole blocks q | k | v, not interleaved by head group as in Qwen3-Next. Yang et al. 2024
    (Gated Delta Networks).
    """

    def __init__(
        self,
        config: Qwen3_5Config,
        layer_id: int,
        alt_stream: torch.cuda.Stream | None = None,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        tp = get_tp_group()
        if config.linear_num_key_heads % tp.size:
            raise ValueError(
                f"{config.linear_num_key_heads} linear key heads cannot be split over {tp.size} tensor-parallel ranks."
            )
        self.layer_id = layer_id
        self.num_v_heads = config.linear_num_value_heads // tp.size
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.use_alt_stream = _gdn_use_alt_stream
        self.overlap = StreamOverlap(alt_stream if self.use_alt_stream else None, _streams.site(GDN_QKVZ_BA))

        hidden_size, value_heads = config.hidden_size, config.linear_num_value_heads
        key_width = config.linear_num_key_heads * self.head_k_dim
        value_width = value_heads * self.head_v_dim
        self.in_proj_qkvz = MergedColumnParallelLinear(
            hidden_size, [key_width, key_width, value_width, value_width], quant_config=quant_config,
            prefix=f"{prefix}.in_proj_qkvz",
        )  # fmt: skip
        self.in_proj_ba = MergedColumnParallelLinear(
            hidden_size, [value_heads, value_heads], quant_config=quant_config, prefix=f"{prefix}.in_proj_ba"
        )
        # One matrix of both if both are plain, for the norm of a step of one row.
        self._qkvz_and_ba: torch.Tensor | None = None
        if quant_config is None:
            self._qkvz_and_ba = join_rows(self.in_proj_qkvz.weight, self.in_proj_ba.weight)
        self.conv1d = Qwen3_5Conv1d((key_width, key_width, value_width), config.linear_conv_kernel_dim)
        # Float32 always: half precision overflows in exp. Dummy values spread like log of uniform(0, 16).
        self.A_log = make_split_vector(value_heads, tp, torch.float32, fill=(1.8, 1.0))
        self.dt_bias = make_split_vector(value_heads, tp, fill=(1.0, 0.0))
        self.norm = RMSNormGated(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            value_width, hidden_size, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )

    @property
    def conv_weight(self) -> torch.Tensor:
        """[C, W]."""
        return self.conv1d.weight.squeeze(1)

    @property
    def matrix(self) -> torch.Tensor | None:
        """As a linear layer's; None where the two products of one row overlap."""
        return None if self.overlap.covers(1) else self._qkvz_and_ba

    def _forward_input_proj(self, hidden: torch.Tensor | ProjectedRows) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, H] -> q | k | v | z [N, C + HV*V] and b | a [N, 2*HV]."""
        if isinstance(hidden, ProjectedRows):
            widths = self.in_proj_qkvz.weight.shape[0], self.in_proj_ba.weight.shape[0]
            qkvz, ba = hidden.product[:, : sum(widths)].split(widths, dim=-1)
            return qkvz, ba
        num_tokens = hidden.shape[0]
        if num_tokens >= DUAL_STREAM_TOKEN_THRESHOLD:
            return self.in_proj_qkvz(hidden), self.in_proj_ba(hidden)
        ba, qkvz = self.overlap.fork_join(
            lambda: self.in_proj_ba(hidden), lambda: self.in_proj_qkvz(hidden), num_tokens=num_tokens
        )
        return qkvz, ba

    def forward(self, hidden: torch.Tensor | ProjectedRows, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden [N, H] -> [N, H]."""
        qkvz, ba = self._forward_input_proj(hidden)
        value_width = self.num_v_heads * self.head_v_dim
        mixed_qkv, z = qkvz.split((qkvz.shape[1] - value_width, value_width), dim=-1)
        b, a = ba.chunk(2, dim=-1)
        out = backend_of(forward_batch, GDNBackend).forward_gdn(mixed_qkv, z, b, a, self, forward_batch)
        return self.out_proj(out.flatten(1))


class Qwen3_5Attention(nn.Module):
    """Grouped-query attention with normed, partly rotated heads and a sigmoid gate on its output.

    Rows of q_proj alternate by head: the query's, then its gate's.
    """

    def __init__(
        self,
        config: Qwen3_5Config,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        alt_stream: torch.cuda.Stream | None = None,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, self.head_dim = config.hidden_size, config.head_dim
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size, self.head_dim, num_heads, num_kv_heads, q_multiplier=2, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim, hidden_size, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.rotary_emb = rotary_emb
        self.attn = RadixAttention(self.num_heads, self.head_dim, self.head_dim**-0.5, self.num_kv_heads, layer_id)
        # Only captured steps overlap.
        self.use_alt_stream = _qknorm_use_alt_stream and not get_global_server_args().disable_cuda_graph
        self.overlap = StreamOverlap(alt_stream if self.use_alt_stream else None, _streams.site(QK_NORM))

    @property
    def matrix(self) -> torch.Tensor | None:
        """As a linear layer's."""
        return self.qkv_proj.matrix

    def _apply_qk_norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [N, Hq, D], k [N, Hk, D], normed over D by their own weights."""
        k, q = self.overlap.fork_join(lambda: self.k_norm(k), lambda: self.q_norm(q), num_tokens=q.shape[0])
        return q, k

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor | ProjectedRows, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """positions [N], hidden [N, H] -> [N, H]."""
        q_gate, k, v = self.qkv_proj(hidden).split(
            (self.qkv_proj.q_width, self.qkv_proj.kv_width, self.qkv_proj.kv_width), dim=-1
        )
        q, gate = q_gate.unflatten(-1, (self.num_heads, 2, self.head_dim)).unbind(2)
        k, v = (rows.unflatten(-1, (self.num_kv_heads, self.head_dim)) for rows in (k, v))
        backend = backend_of(forward_batch, GqaBackend)
        # One launch norms, rotates and stores, except in the steps whose captured form overlaps the norms: it rounds
        # otherwise, and an eager step must equal its replay.
        if forward_batch.kind is not None and self.overlap.covers(q.shape[0]):
            q, k = self._apply_qk_norm(q, k)
            q, k = self.rotary_emb(positions, q, k)
            backend.store(k, v, self.attn, forward_batch)
        else:
            q = backend.prepare_gqa(
                q, k, v, positions, self.q_norm, self.k_norm, self.rotary_emb, self.attn, forward_batch
            )
        return self.o_proj(backend.attend(q, self.attn, forward_batch, gate))


class Qwen3_5DecoderLayer(DecoderLayer):
    """A mixer of ``kind``, LINEAR_ATTENTION (a gated delta net) or FULL_ATTENTION, and a dense or MoE feed-forward."""

    def __init__(
        self,
        config: Qwen3_5Config,
        layer_id: int,
        kind: str,
        rotary_emb: RotaryEmbedding,
        alt_stream: torch.cuda.Stream | None = None,
        quant_config: QuantConfig | None = None,
        fuse_shared: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(config, GemmaRMSNorm)
        prefix = prefix or f"model.layers.{layer_id}"
        self.use_alt_stream = _cuda_use_alt_stream or _hip_use_alt_stream
        self.is_linear, self.is_moe = kind == LINEAR_ATTENTION, config.is_moe
        if self.is_moe:
            self.mlp = Qwen2MoeSparseMoeBlock(
                layer_id,
                config,
                quant_config,
                alt_stream=alt_stream if self.use_alt_stream else None,
                prefix=f"{prefix}.mlp",
                support_shared_expert_fusion=fuse_shared,
                site=_streams.site(SHARED_EXPERTS),
            )
            self.post_attention_layernorm.route_for(self.mlp)
        else:
            self.mlp = GatedMLP(
                config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.mlp"
            )
        if self.is_linear:
            self.linear_attn = Qwen3_5GatedDeltaNet(config, layer_id, alt_stream, quant_config, f"{prefix}.linear_attn")
            self.input_layernorm.project_for(self.linear_attn)
        else:
            self.self_attn = Qwen3_5Attention(
                config, layer_id, rotary_emb, alt_stream, quant_config, f"{prefix}.self_attn"
            )
            self.input_layernorm.project_for(self.self_attn)

    def mix(self, positions: torch.Tensor, hidden: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """A gated delta net knows the order by its recurrence."""
        if self.is_linear:
            return self.linear_attn(hidden, forward_batch)
        return self.self_attn(positions, hidden, forward_batch)


def make_rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    """The rotation of the leading dimensions of query and key heads, for every position of the context."""
    text = config.text
    assert isinstance(text, Qwen3_5Config)
    return RotaryEmbedding(text.rotary_dim, config.num_positions, text.rope.theta, True, text.rope)


class Qwen3_5ForCausalLM(Backbone):
    """The backbone. The name is upstream's; the full models below add the head."""

    def __init__(self, config: ModelConfig, alt_stream: torch.cuda.Stream | None = None) -> None:
        text = config.text
        assert isinstance(text, Qwen3_5Config)
        rotary_emb = make_rotary_embedding(config)
        fuse_shared = can_fuse(text.shared_experts, config.quant_config) and not _disable_shared_experts_fusion()
        layers = (
            Qwen3_5DecoderLayer(text, layer_id, kind, rotary_emb, alt_stream, config.quant_config, fuse_shared)
            for layer_id, kind in enumerate(text.layer_types)
        )
        super().__init__(text, GemmaRMSNorm, layers)


class Qwen3_5ForConditionalGeneration(CausalLM):
    """Backbone and output head of a text-only folder, or of the text part of a conditional-generation folder."""

    packed_modules = {
        "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
        "qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
        "in_proj_qkvz": (("in_proj_qkv", (0, 1, 2)), ("in_proj_z", 3)),
        "in_proj_ba": (("in_proj_b", 0), ("in_proj_a", 1)),
    }

    def __init__(self, config: ModelConfig, streams: StreamPlan = NO_OVERLAP) -> None:
        configure_streams(streams)
        side_stream = streams.side_stream(SHARED_EXPERTS, GDN_QKVZ_BA, QK_NORM)
        super().__init__(config.text, Qwen3_5ForCausalLM(config, side_stream), side_stream)

    def checkpoint_name(self, name: str) -> str | None:
        """Text names with either prefix; the draft head and the vision tower are not taken."""
        if name.startswith(("mtp.", "model.visual.")):
            return None
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        return super().checkpoint_name(name)


class Qwen3_5MoeForConditionalGeneration(Qwen3_5ForConditionalGeneration):
    """The MoE models differ from the dense ones by configuration alone."""


EntryClass = [Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration]
