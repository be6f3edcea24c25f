"""Typed configuration of DeepSeek V4, from the keys of the published config.json or of transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sglang.srt.configs.attention_backends import COMPRESSED, LatentShapes
from sglang.srt.configs.cache_layout import PLAIN_TYPES, CacheLayout, CacheTypes
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE, deepseek_v4_layout, window_layout
from sglang.srt.configs.errors import ConfigReader
from sglang.srt.configs.mtp import mtp_count_refusal
from sglang.srt.configs.rope import RopeConfig, read_rope_section
from sglang.srt.configs.shared_experts import SharedExperts

# Tokens per compressed entry, 0 for none, and what transformers calls a layer of each.
LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_MLP_TYPES = ("hash_moe", "moe")


@dataclass(frozen=True)
class DeepseekV4Config:
    """Shapes and numerics of DeepSeek V4; field names are those of the published config.json where it has them.

    compress_ratios: tokens per compressed entry of each layer (0, 4 or 128). hash_layers: which layers choose experts
    by token id. rope turns layers of ratio 0, compress_rope the others. swiglu_limit bounds gate and up of experts,
    and of shared experts with ``shared_expert_swiglu_limit``.
    """

    attention_family: ClassVar[str] = COMPRESSED  # see ``attention_backends``
    state_dtype: ClassVar[str | None] = None  # of recurrent states
    latent_shapes: ClassVar[LatentShapes | None] = None  # of latent attention
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    hash_layers: tuple[bool, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    shared_expert_swiglu_limit: bool
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    rope: RopeConfig
    compress_rope: RopeConfig
    tie_word_embeddings: bool
    num_nextn_predict_layers: int

    @classmethod
    def from_hf(cls, d: Mapping[str, Any]) -> DeepseekV4Config:
        """Read a config.json object; raises ConfigError that names every missing, ill-typed or unsupported key."""
        reader = ConfigReader(d)
        _check_fixed(reader)
        num_layers = reader.take_int("num_hidden_layers")
        head_dim = reader.take_int("head_dim")
        main, compress = _read_ropes(reader)
        config = cls(
            num_hidden_layers=num_layers,
            head_dim=head_dim,
            qk_rope_head_dim=_read_rope_width(reader, head_dim),
            compress_ratios=_read_ratios(reader, num_layers),
            hash_layers=_read_hash_layers(reader, num_layers),
            n_shared_experts=reader.take_int("n_shared_experts", 1),
            routed_scaling_factor=reader.take_float("routed_scaling_factor"),
            swiglu_limit=reader.take_float("swiglu_limit"),
            shared_expert_swiglu_limit=reader.take_bool("shared_expert_swiglu_limit", True),
            hc_eps=reader.take_float("hc_eps"),
            rms_norm_eps=reader.take_float("rms_norm_eps"),
            rope=main,
            compress_rope=compress,
            tie_word_embeddings=reader.take_bool("tie_word_embeddings", False),
            num_nextn_predict_layers=reader.take_int("num_nextn_predict_layers", 0, minimum=0),
            **reader.take_ints(
                "hidden_size", "moe_intermediate_size", "num_attention_heads", "q_lora_rank", "o_groups", "o_lora_rank",
                "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
                "num_experts_per_tok", "hc_mult", "hc_sinkhorn_iters", "vocab_size", "max_position_embeddings",
            ),
        )  # fmt: skip
        if not reader.problems:
            _check_sizes(config, reader)
        reader.finish()
        return config

    def is_moe_layer(self, i: int) -> bool:
        """True: every layer has experts."""
        return True

    @property
    def num_routed_experts(self) -> int:
        """Experts of each layer."""
        return self.n_routed_experts

    def uneven_parts(self, tp_size: int, expert_tp_size: int) -> dict[str, int]:
        """The sizes, by key, that cannot be divided by ``tp_size`` ranks; heads go with their groups of the output."""
        parts = {"o_groups": tp_size, "moe_intermediate_size": max(tp_size, expert_tp_size)}
        return {name: getattr(self, name) for name, ranks in parts.items() if getattr(self, name) % ranks}

    def cache_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES, num_draft_tokens: int = 0) -> CacheLayout:
        """Rows per token of the window, compressed entries, and what open windows need; every rank keeps all."""
        return deepseek_v4_layout(self, types, num_draft_tokens)

    def draft_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES) -> CacheLayout:
        """Rows per token of the window, of the layer after the model's own, which drafts."""
        return window_layout(self, types, self.num_hidden_layers)

    @property
    def overlap_sites(self) -> tuple[str, ...]:
        """The places of the model that may overlap on a second stream."""
        return ("deepseek.shared_experts", *(["deepseek_v4.compression"] if any(self.compress_ratios) else []))

    @property
    def shared_experts(self) -> SharedExperts:
        """One MLP of the experts' width in every layer."""
        width, blocks = (
            self.moe_intermediate_size,
            tuple(f"model.layers.{i}.mlp" for i in range(self.num_hidden_layers)),
        )
        refusal = "the shared expert of DeepSeek V4, which a flag of its own clamps, is computed apart in this build"
        return SharedExperts("shared_experts", self.n_shared_experts * width, width, blocks, refusal)

    @property
    def mtp_refusal(self) -> str:
        """Why the checkpoint has no MTP layer that can draft; "" if it has. DSpark blocks have no key of their own."""
        return mtp_count_refusal("num_nextn_predict_layers", self.num_nextn_predict_layers)

    @property
    def softmax_scale(self) -> float:
        """head_dim ** -0.5; YaRN's magnitude is not applied."""
        return float(self.head_dim**-0.5)


def _check_fixed(reader: ConfigReader) -> None:
    """Keys that have one value in every released model of this kind."""
    for key, known in (
        ("hidden_act", "silu"), ("scoring_func", "sqrtsoftplus"), ("topk_method", "noaux_tc"),
    ):  # fmt: skip
        reader.take_choice(key, (known,), known)
    model_type = reader.data.get("model_type")
    if model_type != "deepseek_v4":
        what = "is another model" if model_type == "deepseek_v41" else "is not DeepSeek V4"
        reader.problem(f"key model_type must be deepseek_v4, found {model_type!r:.100}, which {what}")
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("norm_topk_prob", True)):
        if reader.take_bool(key, wanted) is not wanted:
            reader.problem(f"key {key} = {str(not wanted).lower()} is not supported for DeepSeek V4")
    for key in ("num_key_value_heads", "n_shared_experts", "n_group", "topk_group"):
        found = reader.take_int(key, 1)
        if found != 1:
            reader.problem(f"key {key} must be 1 for DeepSeek V4, found {found}")
    expert_dtype = reader.data.get("expert_dtype")
    if expert_dtype not in (None, "bf16", "bfloat16", "float32", "fp8", "fp4"):
        reader.problem(f"key expert_dtype = {expert_dtype!r:.100} is not supported: convert the experts to bfloat16")


def _read_ratios(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """``compress_ratios``, whose entry past the last layer is of the MTP layer, or ``layer_types``."""
    ratios = reader.data.get("compress_ratios")
    kinds = reader.data.get("layer_types")
    known = ", ".join(str(ratio) for ratio in LAYER_TYPES)
    from_kinds = _read_layer_types(reader, num_layers) if kinds is not None else None
    if ratios is None:
        if from_kinds is None:
            reader.problem(f"key compress_ratios is missing (one of {known} for each layer expected, or layer_types)")
        return from_kinds or (0,) * num_layers
    if not isinstance(ratios, list) or not all(type(ratio) is int and ratio in LAYER_TYPES for ratio in ratios):
        reader.problem(f"key compress_ratios must list {known} for each layer, found {ratios!r:.200}")
        return (0,) * num_layers
    if len(ratios) not in (num_layers, num_layers + 1) or any(ratios[num_layers:]):
        reader.problem(
            f"key compress_ratios must have {num_layers} entries, or a last one of 0 besides for the MTP layer, found "
            f"{len(ratios)}"
        )
        return (0,) * num_layers
    found = tuple(ratios[:num_layers])
    if from_kinds not in (None, found):
        reader.problem("keys compress_ratios and layer_types disagree: keep one of them")
    return found


def _read_layer_types(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    kinds = reader.data["layer_types"]
    ratio_of = {kind: ratio for ratio, kind in LAYER_TYPES.items()}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in ratio_of for kind in kinds):
        names = ", ".join(ratio_of)
        reader.problem(
            f"key layer_types must list one of {names} for each of {num_layers} layers, found {kinds!r:.200}"
        )
        return (0,) * num_layers
    rates = reader.data.get("compress_rates")
    for kind, ratio in ratio_of.items():
        found = rates.get(kind, ratio) if isinstance(rates, dict) else ratio
        if found != ratio:
            reader.problem(f"key compress_rates.{kind} must be {ratio}, found {found!r:.100}")
    if rates is not None and not isinstance(rates, dict):
        reader.problem(f"key compress_rates must be an object, found {rates!r:.100}")
    return tuple(ratio_of[kind] for kind in kinds)


def _read_hash_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """``num_hash_layers`` of the first layers, or ``mlp_layer_types``."""
    kinds = reader.data.get("mlp_layer_types")
    count = reader.take_int("num_hash_layers", None if kinds is not None else -1, minimum=0)
    if kinds is None:
        if count == -1:
            reader.problem("key num_hash_layers is missing (an integer of at least 0 expected, or mlp_layer_types)")
        return tuple(i < count for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in _MLP_TYPES for kind in kinds):
        names = ", ".join(_MLP_TYPES)
        reader.problem(
            f"key mlp_layer_types must list one of {names} for each of {num_layers} layers, found {kinds!r:.200}"
        )
        return (False,) * num_layers
    found = tuple(kind == "hash_moe" for kind in kinds)
    if count is not None and found != tuple(i < count for i in range(num_layers)):
        reader.problem("keys num_hash_layers and mlp_layer_types disagree: keep one of them")
    return found


def _read_rope_width(reader: ConfigReader, head_dim: int) -> int:
    """``qk_rope_head_dim``, or ``partial_rotary_factor`` of a head."""
    factor = reader.data.get("partial_rotary_factor")
    if reader.data.get("qk_rope_head_dim") is None and factor is not None:
        width = reader.take_float("partial_rotary_factor") * head_dim
        if width != int(width) or not 0 < width <= head_dim:
            reader.problem(f"key partial_rotary_factor {factor} of head_dim {head_dim} is no number of columns")
        return max(int(width), 2)
    width = reader.take_int("qk_rope_head_dim", minimum=2)
    if factor is not None and factor * head_dim != width:
        reader.problem(f"keys qk_rope_head_dim {width} and partial_rotary_factor {factor} disagree: keep one of them")
    return int(width)


def _read_ropes(reader: ConfigReader) -> tuple[RopeConfig, RopeConfig]:
    """The rotation of layers of ratio 0, and of the others, without YaRN's magnitude.

    The published form has rope_theta, compress_rope_theta and rope_scaling, which is of the latter alone; transformers
    writes both as objects "main" and "compress" of rope_parameters.
    """
    nested = reader.data.get("rope_parameters")
    sections: dict[str, dict[str, Any]] = {}
    if isinstance(nested, dict) and ("main" in nested or "compress" in nested):
        for name in ("main", "compress"):
            section = nested.get(name)
            if not isinstance(section, dict):
                reader.problem(f"key rope_parameters.{name} must be an object, found {section!r:.100}")
                section = {"rope_theta": 1.0}
            sections[f"rope_parameters.{name}."] = dict(section)
    else:
        key = "rope_scaling" if reader.data.get("rope_scaling") is not None else "rope_parameters"
        scaling = reader.data.get(key)
        if scaling is None:
            reader.problem("key rope_scaling is missing (an object expected, or rope_parameters)")
        elif not isinstance(scaling, dict):
            reader.problem(f"key {key} must be an object, found {scaling!r:.100}")
        scaling = dict(scaling) if isinstance(scaling, dict) else {}
        sections[""] = {"rope_theta": reader.take_float("rope_theta")}
        sections[f"{key}."] = {**scaling, "rope_theta": reader.take_float("compress_rope_theta")}
    main, compress = (_read_one_rope(reader, prefix, section) for prefix, section in sections.items())
    if main.rope_type == "yarn":
        reader.problem("key rope_parameters.main.rope_type must be default, found yarn")
    return main, compress


def _read_one_rope(reader: ConfigReader, prefix: str, section: dict[str, Any]) -> RopeConfig:
    # The one factor that transformers may name for YaRN is the one that is always applied.
    if section.get("attention_factor") == 1.0:
        del section["attention_factor"]
    inner = ConfigReader(section, prefix)
    for key in ("mscale", "mscale_all_dim"):
        if section.get(key) is not None:
            inner.problem(f"key {prefix}{key} is not supported: DeepSeek V4 does not scale cosines and sines")
    rope = read_rope_section(inner, reader.data)
    reader.problems += inner.problems
    return replace(rope, mscale=1.0, mscale_all_dim=1.0)


def _check_sizes(config: DeepseekV4Config, reader: ConfigReader) -> None:
    rope = config.qk_rope_head_dim
    if rope % 2:
        reader.problem(f"key qk_rope_head_dim must be even, found {rope}")
    for key in ("head_dim", "index_head_dim"):
        if getattr(config, key) < rope:
            reader.problem(f"key {key} {getattr(config, key)} is below the {rope} columns that are rotated")
    if config.num_attention_heads % config.o_groups:
        reader.problem(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of o_groups {config.o_groups}"
        )
    if config.num_experts_per_tok > config.n_routed_experts:
        experts = f"the {config.n_routed_experts} experts in reach"
        reader.problem(f"num_experts_per_tok {config.num_experts_per_tok} exceeds {experts}")
    if config.n_routed_experts < 2:
        reader.problem(f"noaux_tc needs at least two experts: n_routed_experts {config.n_routed_experts}")
    if config.sliding_window > PAGE_SIZE:
        reader.problem(f"key sliding_window {config.sliding_window} exceeds a page of {PAGE_SIZE} tokens")
