"""Typed configuration of the Qwen3.5 text models (dense and MoE), from the keys of their (text) config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.srt.configs.attention_backends import GQA, LatentShapes
from sglang.srt.configs.cache_layout import FULL, PLAIN_TYPES, STATE, BufferSpec, CacheLayout, CacheTypes, PoolSpec
from sglang.srt.configs.errors import ConfigReader
from sglang.srt.configs.mtp import mtp_count_refusal
from sglang.srt.configs.rope import RopeConfig, read_rope, rope_section
from sglang.srt.configs.shared_experts import SharedExperts

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class Qwen3_5Config:
    """Numbers of a config.json by its names; ``num_experts`` 0 means dense, and the expert widths are 0 then."""

    attention_family: ClassVar[str] = GQA  # see ``attention_backends``
    latent_shapes: ClassVar[LatentShapes | None] = None  # of latent attention
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    mamba_ssm_dtype: str
    partial_rotary_factor: float
    rope: RopeConfig
    max_position_embeddings: int
    mtp_num_hidden_layers: int
    mtp_use_dedicated_embeddings: bool

    @classmethod
    def from_hf(cls, text_dict: Mapping[str, Any]) -> Qwen3_5Config:
        """Read a text config object; raises ConfigError that names every missing or ill-typed key."""
        reader = ConfigReader(text_dict)
        _refuse_variants(reader)
        num_layers = reader.take_int("num_hidden_layers")
        _, rope = rope_section(ConfigReader(text_dict))
        rotary = ConfigReader(rope or {})
        config = cls(
            num_hidden_layers=num_layers,
            rms_norm_eps=reader.take_float("rms_norm_eps"),
            tie_word_embeddings=reader.take_bool("tie_word_embeddings", False),
            layer_types=_read_layer_types(reader, num_layers),
            linear_conv_kernel_dim=reader.take_int("linear_conv_kernel_dim", minimum=2),
            mamba_ssm_dtype=reader.take_choice("mamba_ssm_dtype", ("float32", "bfloat16", "float16"), "float32"),
            partial_rotary_factor=rotary.take_float("partial_rotary_factor", 0.25),
            rope=read_rope(reader),
            mtp_num_hidden_layers=reader.take_int("mtp_num_hidden_layers", 0, minimum=0),
            mtp_use_dedicated_embeddings=reader.take_bool("mtp_use_dedicated_embeddings", False),
            **reader.take_ints(
                "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
                "max_position_embeddings",
            ),
            **_read_experts(reader),
        )  # fmt: skip
        reader.problems += rotary.problems
        if not reader.problems:
            _check_shapes(config, reader)
        reader.finish()
        return config

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def state_dtype(self) -> str | None:
        """The type of recurrent states that the checkpoint names; None where no layer has any."""
        return self.mamba_ssm_dtype if self.linear_layer_ids else None

    @property
    def num_routed_experts(self) -> int:
        """Experts of each layer; 0 for a dense model."""
        return self.num_experts

    def uneven_parts(self, tp_size: int, expert_tp_size: int) -> dict[str, int]:
        """The sizes, by key, that do not part over ``tp_size`` ranks; an expert's width over ``expert_tp_size``."""
        names = ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "intermediate_size",
                 "shared_expert_intermediate_size")  # fmt: skip
        parts = {**dict.fromkeys(names, tp_size), "moe_intermediate_size": expert_tp_size}
        uneven = {name: getattr(self, name) for name, ranks in parts.items() if getattr(self, name) % ranks}
        kv_heads = self.num_key_value_heads
        if kv_heads % tp_size and tp_size % kv_heads:
            uneven["num_key_value_heads"] = kv_heads
        return uneven

    def cache_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES, num_draft_tokens: int = 0) -> CacheLayout:
        """Keys and values per token, states per sequence, with tails where ``num_draft_tokens`` is not 0."""
        pools = [self._keys_and_values(self.full_attention_layer_ids, tp_size, types)]
        if self.linear_layer_ids:
            heads, dim = self.linear_num_value_heads // tp_size, self.linear_value_head_dim
            key_dim = self.linear_num_key_heads * self.linear_key_head_dim
            channels = (2 * key_dim + self.linear_num_value_heads * dim) // tp_size
            # The convolution's last inputs [C, W - 1], and the state [HV, V, K], K fastest.
            conv = BufferSpec("conv", (channels, self.linear_conv_kernel_dim - 1), types.conv)
            ssm = BufferSpec("ssm", (heads, dim, self.linear_key_head_dim), types.state or self.mamba_ssm_dtype)
            pools.append(PoolSpec("gdn", STATE, self.linear_layer_ids, (conv, ssm)))
            if num_draft_tokens:
                # For each row a state more would be a hundred times as much at the released sizes.
                qkv = BufferSpec("qkv", (num_draft_tokens, channels), types.inputs)
                gates = BufferSpec("gates", (num_draft_tokens, 2 * heads), types.inputs)
                pools.append(
                    PoolSpec("gdn_tail", STATE, self.linear_layer_ids, (qkv, gates, BufferSpec("len", (), "int64")))
                )
        return CacheLayout(tuple(pools))

    def draft_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES) -> CacheLayout:
        """Keys and values of the layer after the model's own, which drafts."""
        return CacheLayout((self._keys_and_values((self.num_hidden_layers,), tp_size, types),))

    def _keys_and_values(self, layers: tuple[int, ...], tp_size: int, types: CacheTypes) -> PoolSpec:
        # Each rank holds at least one KV head, repeated where ranks outnumber heads.
        row = (max(1, self.num_key_value_heads // tp_size), self.head_dim)
        return PoolSpec("kv", FULL, layers, (BufferSpec("k", row, types.kv), BufferSpec("v", row, types.kv)))

    @property
    def overlap_sites(self) -> tuple[str, ...]:
        """The places of the model that may overlap on a second stream."""
        there = {
            "qwen3_5.shared_experts": self.is_moe,
            "qwen3_5.gdn_qkvz_ba": self.linear_layer_ids,
            "qwen3_5.qk_norm": self.full_attention_layer_ids,
        }
        return tuple(name for name, has in there.items() if has)

    @property
    def shared_experts(self) -> SharedExperts:
        """One expert in every layer of a MoE model."""
        return self._shared_experts(f"model.layers.{layer}" for layer in range(self.num_hidden_layers))

    @property
    def mtp_shared_experts(self) -> SharedExperts:
        """The same of the MTP layer."""
        return self._shared_experts(("mtp.layers.0",))

    def _shared_experts(self, layers: Iterable[str]) -> SharedExperts:
        blocks = tuple(f"{layer}.mlp" for layer in layers) if self.is_moe else ()
        return SharedExperts("shared_expert", self.shared_expert_intermediate_size, self.moe_intermediate_size, blocks)

    @property
    def mtp_refusal(self) -> str:
        """Why the checkpoint has no MTP layer that can draft; "" if it has."""
        if self.mtp_use_dedicated_embeddings:
            return "key mtp_use_dedicated_embeddings is true: drafts share the embedding of the model"
        return mtp_count_refusal("mtp_num_hidden_layers", self.mtp_num_hidden_layers)

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_layer_ids(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LINEAR_ATTENTION)

    @property
    def full_attention_layer_ids(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)


def _refuse_variants(reader: ConfigReader) -> None:
    """Keys whose other values describe a model that is not computed here."""
    reader.take_choice("hidden_act", ("silu",), "silu")
    if reader.take_bool("attention_bias", False):
        reader.problem("key attention_bias = true is not supported: Qwen3.5 projections have no bias")
    if not reader.take_bool("attn_output_gate", True):
        reader.problem("key attn_output_gate = false is not supported: Qwen3.5 attention is gated")
    if reader.data.get("mlp_only_layers"):
        reader.problem("key mlp_only_layers is not supported: every layer of a Qwen3.5 MoE model has experts")
    if reader.take_int("decoder_sparse_step", 1) != 1:
        reader.problem("key decoder_sparse_step must be 1: every layer of a Qwen3.5 MoE model has experts")


def _read_layer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """``layer_types``, else derived from ``full_attention_interval``, which transformers does not write back."""
    kinds = reader.data.get("layer_types")
    if kinds is None:
        if reader.data.get("full_attention_interval") is None:
            reader.problem(f"key {reader.prefix}layer_types is missing (or full_attention_interval)")
            return ()
        interval = reader.take_int("full_attention_interval")
        return tuple(LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(num_layers))
    if not isinstance(kinds, list) or any(kind not in (LINEAR_ATTENTION, FULL_ATTENTION) for kind in kinds):
        allowed = f"{LINEAR_ATTENTION!r} or {FULL_ATTENTION!r}"
        reader.problem(f"key layer_types must list {allowed} for each layer, found {kinds!r}")
        return ()
    if len(kinds) != num_layers:
        reader.problem(f"key layer_types has {len(kinds)} entries but num_hidden_layers is {num_layers}")
    return tuple(kinds)


def _read_experts(reader: ConfigReader) -> dict[str, Any]:
    num_experts = reader.take_int("num_experts", 0, minimum=0)
    if num_experts == 0:
        return {
            "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
            "shared_expert_intermediate_size": 0, "norm_topk_prob": True,
            "intermediate_size": reader.take_int("intermediate_size"),
        }  # fmt: skip
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": reader.take_int("num_experts_per_tok"),
        "moe_intermediate_size": reader.take_int("moe_intermediate_size"),
        "shared_expert_intermediate_size": reader.take_int("shared_expert_intermediate_size"),
        # The released MoE configs do not carry the key, and their router always renormalises.
        "norm_topk_prob": reader.take_bool("norm_topk_prob", True),
        "intermediate_size": reader.take_int("intermediate_size", 0, minimum=0),
    }


def _check_shapes(config: Qwen3_5Config, reader: ConfigReader) -> None:
    pairs = (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"))
    for many, few in pairs:
        if getattr(config, many) % getattr(config, few):
            reader.problem(f"{many} {getattr(config, many)} is not a multiple of {few} {getattr(config, few)}")
    if config.rotary_dim < 2 or config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        reader.problem(
            f"head_dim {config.head_dim} x partial_rotary_factor {config.partial_rotary_factor} gives "
            f"{config.rotary_dim} rotated dimensions: an even number from 2 to head_dim is needed"
        )
    if config.num_experts_per_tok > config.num_experts:
        reader.problem(f"num_experts_per_tok {config.num_experts_per_tok} exceeds num_experts {config.num_experts}")
