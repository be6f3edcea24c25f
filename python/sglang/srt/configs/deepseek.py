"""Typed configuration of the DeepSeek V2 and V3 families, from the keys of their config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.srt.configs.attention_backends import MLA, LatentShapes
from sglang.srt.configs.cache_layout import FULL, PLAIN_TYPES, BufferSpec, CacheLayout, CacheTypes, PoolSpec
from sglang.srt.configs.errors import ConfigReader
from sglang.srt.configs.mtp import mtp_count_refusal
from sglang.srt.configs.rope import RopeConfig, read_rope
from sglang.srt.configs.shared_experts import SharedExperts

# (scoring_func, topk_method) pairs that released models use and that the router implements.
_ROUTERS = (("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc"))


@dataclass(frozen=True)
class DeepseekConfig:
    """Numbers of a config.json by its names; ``q_lora_rank`` None: plain queries, ``n_routed_experts`` None: dense."""

    attention_family: ClassVar[str] = MLA  # see ``attention_backends``
    state_dtype: ClassVar[str | None] = None  # of recurrent states
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    n_routed_experts: int | None
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    moe_layer_freq: int
    norm_topk_prob: bool
    scoring_func: str
    topk_method: str
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    rope_interleave: bool
    attention_bias: bool
    num_nextn_predict_layers: int

    @classmethod
    def from_hf(cls, d: Mapping[str, Any]) -> DeepseekConfig:
        """Read a config.json object; raises ConfigError that names every missing or ill-typed key."""
        reader = ConfigReader(d)
        reader.take_choice("hidden_act", ("silu",), "silu")
        if reader.take_bool("mlp_bias", False):
            reader.problem("key mlp_bias = true is not supported: the feed-forward layers have no bias")
        config = cls(
            rms_norm_eps=reader.take_float("rms_norm_eps"),
            q_lora_rank=reader.take_int("q_lora_rank", None),
            qk_rope_head_dim=reader.take_int("qk_rope_head_dim", minimum=2),
            rope=read_rope(reader),
            tie_word_embeddings=reader.take_bool("tie_word_embeddings", False),
            rope_interleave=reader.take_bool("rope_interleave", True),
            attention_bias=reader.take_bool("attention_bias", False),
            num_nextn_predict_layers=reader.take_int("num_nextn_predict_layers", 0, minimum=0),
            **reader.take_ints(
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "max_position_embeddings",
            ),
            **_read_experts(reader),
        )  # fmt: skip
        if config.qk_rope_head_dim % 2:
            reader.problem(f"key qk_rope_head_dim must be even, found {config.qk_rope_head_dim}")
        if not reader.problems and config.n_routed_experts is not None:
            _check_router(config, reader)
        reader.finish()
        return config

    def is_moe_layer(self, i: int) -> bool:
        """True when layer ``i`` routes to experts; the others are dense."""
        return self.n_routed_experts is not None and i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0

    @property
    def num_routed_experts(self) -> int:
        """Experts of each MoE layer; 0 where every layer is dense."""
        return self.n_routed_experts or 0

    def uneven_parts(self, tp_size: int, expert_tp_size: int) -> dict[str, int]:
        """The sizes, by key, that cannot be divided by ``tp_size`` ranks; an expert's width over ``expert_tp_size``."""
        parts = {"num_attention_heads": tp_size, "intermediate_size": tp_size, "moe_intermediate_size": expert_tp_size}
        return {name: getattr(self, name) for name, ranks in parts.items() if getattr(self, name) % ranks}

    @property
    def latent_shapes(self) -> LatentShapes:
        """What backends of latent attention need to know."""
        return LatentShapes(self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)

    def cache_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES, num_draft_tokens: int = 0) -> CacheLayout:
        """One latent row per token and layer, its key's rotated part last; a verify step needs nothing more."""
        return self._latents(range(self.num_hidden_layers), types)

    def draft_layout(self, tp_size: int = 1, types: CacheTypes = PLAIN_TYPES) -> CacheLayout:
        """The same for the draft layer."""
        return self._latents([self.num_hidden_layers], types)

    def _latents(self, layers: Iterable[int], types: CacheTypes) -> CacheLayout:
        row = BufferSpec("latent", (self.kv_lora_rank + self.qk_rope_head_dim,), types.kv)
        return CacheLayout((PoolSpec("latent", FULL, tuple(layers), (row,)),))

    @property
    def overlap_sites(self) -> tuple[str, ...]:
        """The places of the model that may overlap on a second stream."""
        return ("deepseek.shared_experts",) if self.shared_experts.blocks and self.n_shared_experts else ()

    @property
    def shared_experts(self) -> SharedExperts:
        """One MLP of ``n_shared_experts`` times the expert width."""
        return self._shared_experts(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    @property
    def mtp_shared_experts(self) -> SharedExperts:
        """The same for the MTP layer, which has experts even if the model has dense layers."""
        return self._shared_experts((self.num_hidden_layers,) if self.n_routed_experts is not None else ())

    def _shared_experts(self, layers: Iterable[int]) -> SharedExperts:
        width = self.moe_intermediate_size
        blocks = tuple(f"model.layers.{layer}.mlp" for layer in layers)
        return SharedExperts("shared_experts", self.n_shared_experts * width, width, blocks)

    @property
    def mtp_refusal(self) -> str:
        """Why the checkpoint has no MTP layer that can draft; "" if it has."""
        return mtp_count_refusal("num_nextn_predict_layers", self.num_nextn_predict_layers)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim ** -0.5, times the square of YaRN's magnitude m(mscale_all_dim)."""
        return self.qk_head_dim**-0.5 * self.rope.magnitude(self.rope.mscale_all_dim) ** 2


def _read_experts(reader: ConfigReader) -> dict[str, Any]:
    """The expert fields; a model without ``n_routed_experts`` needs none of them."""
    routed = reader.take_int("n_routed_experts", None)
    if routed is None:
        return {
            "n_routed_experts": None, "n_shared_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
            "first_k_dense_replace": 0, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        }  # fmt: skip
    # transformers writes neither key for V3, whose class has one router only.
    names = (reader.data.get("model_type"), *(reader.data.get("architectures") or []))
    is_v3 = "deepseek_v3" in names or "DeepseekV3ForCausalLM" in names
    scoring, method = _ROUTERS[2] if is_v3 else _ROUTERS[0]
    return {
        "n_routed_experts": routed,
        "n_shared_experts": reader.take_int("n_shared_experts", 0, minimum=0),
        "num_experts_per_tok": reader.take_int("num_experts_per_tok"),
        "moe_intermediate_size": reader.take_int("moe_intermediate_size"),
        "first_k_dense_replace": reader.take_int("first_k_dense_replace", 0, minimum=0),
        "moe_layer_freq": reader.take_int("moe_layer_freq", 1),
        "norm_topk_prob": reader.take_bool("norm_topk_prob"),
        "scoring_func": reader.take_choice("scoring_func", ("softmax", "sigmoid"), scoring),
        "topk_method": reader.take_choice("topk_method", ("greedy", "group_limited_greedy", "noaux_tc"), method),
        "n_group": reader.take_int("n_group", 1),
        "topk_group": reader.take_int("topk_group", 1),
        "routed_scaling_factor": reader.take_float("routed_scaling_factor"),
    }


def _check_router(config: DeepseekConfig, reader: ConfigReader) -> None:
    routed = config.n_routed_experts or 0
    if (config.scoring_func, config.topk_method) not in _ROUTERS:
        known = ", ".join(f"{scoring} with {method}" for scoring, method in _ROUTERS)
        reader.problem(
            f"scoring_func {config.scoring_func!r} with topk_method {config.topk_method!r} is not supported "
            f"(known: {known})"
        )
    if config.scoring_func == "softmax" and config.norm_topk_prob and config.routed_scaling_factor != 1.0:
        # Published implementations disagree on whether renormalised weights are scaled.
        reader.problem("norm_topk_prob = true with scoring_func softmax needs routed_scaling_factor 1.0")
    groups = 1 if config.topk_method == "greedy" else config.n_group
    if routed % groups:
        reader.problem(f"n_routed_experts {routed} is not a multiple of n_group {groups}")
    if groups > 1 and config.topk_group > groups:
        reader.problem(f"topk_group {config.topk_group} is greater than n_group {groups}")
    if config.topk_method == "noaux_tc" and routed // groups < 2:
        reader.problem(f"noaux_tc scores a group by its two best experts: n_routed_experts {routed} / n_group {groups}")
    reachable = routed if groups == 1 else routed // groups * config.topk_group
    if config.num_experts_per_tok > reachable:
        reader.problem(f"num_experts_per_tok {config.num_experts_per_tok} exceeds the {reachable} experts in reach")
