"""The configuration of a model folder in Hugging Face format, read once and typed."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.generation import end_token_ids, sampling_defaults
from sglang.srt.configs.model_folder import existing_config
from sglang.srt.configs.quantization import QuantConfig, read_quantization
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.configs.stored_experts import stored_experts
from sglang.srt.utils.common import read_json_object

logger = logging.getLogger(__name__)

TextConfig = DeepseekConfig | DeepseekV4Config | Qwen3_5Config
# architectures string -> class of its text config
SUPPORTED_ARCHITECTURES: dict[str, type[DeepseekConfig] | type[DeepseekV4Config] | type[Qwen3_5Config]] = {
    "DeepseekV2ForCausalLM": DeepseekConfig,
    "DeepseekV3ForCausalLM": DeepseekConfig,
    "DeepseekV4ForCausalLM": DeepseekV4Config,
    "Qwen3_5ForCausalLM": Qwen3_5Config,
    "Qwen3_5ForConditionalGeneration": Qwen3_5Config,
    "Qwen3_5MoeForCausalLM": Qwen3_5Config,
    "Qwen3_5MoeForConditionalGeneration": Qwen3_5Config,
}
DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
# Keys that an override may add although the folder's config.json lacks them.
_EXTRA_OVERRIDE_KEYS = (
    "architectures", "model_type", "text_config", "quantization_config", "rope_scaling", "rope_parameters",
    "rope_theta", "compress_rope_theta", "full_attention_interval", "eos_token_id", "bos_token_id", "dtype",
    "torch_dtype", "hidden_act",
)  # fmt: skip
# One entry per layer.
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "compress_ratios")

# Rows that a speculative step may compute past the end of a context.
ROWS_PAST_CONTEXT = 16


@dataclass(frozen=True)
class ModelConfig:
    """A model folder's configuration: ``text`` holds shapes and numerics, the rest is what serving needs.

    ``context_len`` and ``vocab_size`` are in tokens; ``eos_token_ids`` is the union of what the folder's files say and
    may be empty; ``generation_defaults`` are sampling parameters from generation_config.json; ``hf_config`` is
    config.json after overrides. ``quant_config`` None means plain weights; ``kv_cache_dtype`` is "auto" (``dtype``),
    "bfloat16" or "fp8_e4m3" (this machine's 8-bit float).
    """

    model_path: str
    architecture: str
    hf_config: dict[str, Any]
    text: TextConfig
    context_len: int
    vocab_size: int
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    num_hidden_layers: int
    generation_defaults: dict[str, Any]
    quant_config: QuantConfig | None = None
    kv_cache_dtype: str = "auto"

    @property
    def num_positions(self) -> int:
        """Positions that a step may compute; those past the context hold drafts that are never accepted."""
        return self.context_len + ROWS_PAST_CONTEXT

    @classmethod
    def from_path(
        cls,
        model_path: str,
        *,
        json_model_override_args: dict[str, Any] | None = None,
        context_length: int | None = None,
        dtype: str = "auto",
        platform_kind: str = "cpu",
        quantization: str | None = None,
        dequantize_mxfp4: bool = False,
        kv_cache_dtype: str = "auto",
        use_generation_defaults: bool = True,
    ) -> ModelConfig:
        """Read ``model_path``/config.json and generation_config.json.

        ``dtype`` "auto" is float32 on the platform kind "cpu" and the checkpoint's dtype elsewhere. ``quantization``
        "fp8" quantises matrices on load; None serves them as the checkpoint has them, but MXFP4 ones with
        ``dequantize_mxfp4``, which become plain. The files of a checkpoint, if they are there, say in which format the
        experts of DeepSeek V4 are. The sampling values of
        generation_config.json are read only with ``use_generation_defaults``. The tokenizer's end tokens are not
        known here (``with_tokenizer_end``). Raises ConfigError that names the file and every problem found in it.
        """
        config_file = existing_config(model_path)
        hf_config = _load_json(config_file)
        try:
            hf_config = apply_overrides(hf_config, json_model_override_args or {})
            text_dict = text_part(hf_config)
            architecture = _find_architecture(hf_config)
            quant_config = read_quantization(hf_config, quantization)
            text = SUPPORTED_ARCHITECTURES[architecture].from_hf(text_dict)
            if quant_config is not None:
                quant_config = replace(quant_config, dequantize_mxfp4=dequantize_mxfp4)
            if quant_config is not None and not quant_config.on_load and isinstance(text, DeepseekV4Config):
                quant_config = quant_config.with_experts(stored_experts(config_file.parent, text.num_hidden_layers))
            ends, defaults = _read_generation_config(config_file.parent, text.vocab_size, use_generation_defaults)
            nested = "text_config." if hf_config.get("text_config") is not None else ""
            ends += end_token_ids(text_dict, text.vocab_size, nested) + end_token_ids(hf_config, text.vocab_size)
            return cls(
                model_path=model_path,
                architecture=architecture,
                hf_config=hf_config,
                text=text,
                context_len=_context_len(text, context_length),
                vocab_size=text.vocab_size,
                dtype=_resolve_dtype(dtype, text_dict, hf_config, platform_kind),
                eos_token_ids=tuple(dict.fromkeys(ends)),
                num_hidden_layers=text.num_hidden_layers,
                generation_defaults=defaults,
                quant_config=quant_config,
                kv_cache_dtype=kv_cache_dtype,
            )
        except ConfigError as error:
            raise ConfigError(*error.problems, source=error.source or str(config_file)) from None

    def with_tokenizer_end(self, ids: Sequence[int], source: str) -> ModelConfig:
        """Add the end tokens of tokenizer folder ``source``. Raises ConfigError for ids beyond the vocabulary."""
        outside = [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]
        if outside:
            raise ConfigError(
                f"the tokenizer's end token has the id {outside[0]}, but the vocabulary of the model has "
                f"{self.vocab_size} tokens: the tokenizer does not belong to this model",
                source=source,
            )
        return replace(self, eos_token_ids=tuple(dict.fromkeys([*self.eos_token_ids, *ids])))

    def shared_fusion_refusal(self, moe_a2a_backend: str) -> str:
        """Why shared experts cannot be computed as routed ones; "" if they can."""
        return self.text.shared_experts.fusion_refusal(self.quant_config, moe_a2a_backend)


def text_part(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys: ``text_config`` of a conditional-generation config, else the config itself."""
    nested = hf_config.get("text_config")
    if nested is None:
        return dict(hf_config)
    if not isinstance(nested, dict):
        raise ConfigError(f"key text_config must be an object, found {nested!r:.200}")
    text = dict(nested)
    outer = hf_config.get("tie_word_embeddings")
    if outer is not None and text.setdefault("tie_word_embeddings", outer) != outer:
        raise ConfigError(
            f"key tie_word_embeddings is {outer} but text_config.tie_word_embeddings is {text['tie_word_embeddings']}: "
            "make them equal"
        )
    return text


def apply_overrides(hf_config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``hf_config`` with ``--json-model-override-args`` applied.

    A key that only ``text_config`` has goes there. Fewer layers cut lists of layers too. An unknown key is an error.
    """
    result = copy.deepcopy(hf_config)
    nested = result.get("text_config") if isinstance(result.get("text_config"), dict) else None
    known = set(result) | set(nested or ()) | set(_EXTRA_OVERRIDE_KEYS)
    known |= {field.name for config in set(SUPPORTED_ARCHITECTURES.values()) for field in fields(config)}
    problems = []
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"--json-model-override-args: no config key {key!r}{hint}")
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and key == "text_config":
            result[key] = _override_section(result[key], value)
        elif nested is not None and key not in result and key not in ("quantization_config", "architectures"):
            result["text_config"] = _override_section(result["text_config"], {key: value})
        else:
            result = _override_section(result, {key: value})
    if problems:
        raise ConfigError(*problems)
    return result


def _override_section(section: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = {**section, **overrides}
    # One spelling of the rotary parameters replaces the other; the base stays unless it is given again.
    for new, old in (("rope_scaling", "rope_parameters"), ("rope_parameters", "rope_scaling")):
        if new in overrides and old not in overrides and isinstance(result.get(old), dict):
            previous = result.pop(old)
            for key in ("rope_theta", "partial_rotary_factor"):
                if previous.get(key) is not None:
                    result.setdefault(key, previous[key])
    layers = overrides.get("num_hidden_layers")
    for key in _LAYER_LISTS:
        if isinstance(result.get(key), list) and isinstance(layers, int) and key not in overrides:
            result[key] = result[key][:layers]
    return result


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(error.problems[0].removeprefix(f"{path} "), source=str(path)) from None


def _read_generation_config(
    folder: Path, vocab_size: int, use_defaults: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """End token ids and sampling parameters of generation_config.json; nothing of either where it is absent."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return (), {}
    generation = _load_json(path)
    try:
        ends = end_token_ids(generation, vocab_size)
        defaults, notes = sampling_defaults(generation) if use_defaults else ({}, [])
    except ConfigError as error:
        raise ConfigError(*error.problems, source=str(path)) from None
    for note in notes:
        logger.info("generation_config.json: %s", note)
    return ends, defaults


def _find_architecture(hf_config: Mapping[str, Any]) -> str:
    names = hf_config.get("architectures")
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"key architectures must list the model's class name, found {names!r:.200}. Supported: {supported}."
        )
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return str(name)
    raise ConfigError(f"architecture {', '.join(names):.200} is not supported. Supported: {supported}.")


def _context_len(text: TextConfig, context_length: int | None) -> int:
    limit = text.max_position_embeddings
    if context_length is None:
        return limit
    if context_length < 1:
        raise ConfigError(f"--context-length must be at least 1, got {context_length}.")
    if context_length > limit:
        raise ConfigError(
            f"--context-length {context_length} exceeds max_position_embeddings {limit}: lower it to {limit} or less, "
            "or extend the model's rotary embedding with --json-model-override-args."
        )
    return context_length


def _resolve_dtype(
    dtype: str, text_dict: Mapping[str, Any], hf_config: Mapping[str, Any], platform_kind: str
) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype} is unknown: use auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    named = next((d[k] for d in (text_dict, hf_config) for k in ("dtype", "torch_dtype") if d.get(k) is not None), None)
    if platform_kind == "cpu":
        logger.info("dtype: auto -> float32 (the checkpoint says %s; on CPU, auto means float32)", named or "nothing")
        return torch.float32
    if not isinstance(named, str) or named not in DTYPES:
        raise ConfigError(
            f"key dtype must be one of {', '.join(DTYPES)}, found {named!r:.200}: set it, or pass --dtype."
        )
    return DTYPES[named]
