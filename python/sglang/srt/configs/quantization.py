"""What a config.json says of quantised weights: 8-bit floats with scales by blocks, or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.configs.errors import ConfigError, ConfigReader

# Rows and columns of weights, and columns of activations, that share a scale.
BLOCK = 128
# Matrices of a few rows, which published checkpoints leave alone too; routers and heads are never quantised.
SKIPPED_ON_LOAD = ("in_proj_a", "in_proj_b")


@dataclass(frozen=True)
class QuantConfig:
    """Matrices as e4m3 floats with a float32 scale for each 128x128 block; activations are quantised as they come.

    on_load: the checkpoint is not quantised, and its matrices are while they load. skipped: regular expressions over
    names of modules that stay as they are. merged: checkpoint names of the modules that one module of the model joins.
    """

    on_load: bool = False
    skipped: tuple[str, ...] = ()
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> QuantConfig:
        """Read a quantization_config; raises ConfigError that names every key that asks for something else.

        ``scale_fmt`` tells how the scales were rounded when the checkpoint was made; those of activations stay float32.
        """
        reader = ConfigReader(settings, "quantization_config.")
        for key, known in (("fmt", ("e4m3",)), ("activation_scheme", ("dynamic",)), ("expert_dtype", ("fp8",))):
            reader.take_choice(key, known, known[0])
        reader.take_choice("scale_fmt", ("float", "ue8m0"), "float")
        if settings.get("weight_block_size") != [BLOCK, BLOCK]:
            found = settings.get("weight_block_size")
            reader.problem(f"key quantization_config.weight_block_size must be [{BLOCK}, {BLOCK}], found {found!r}")
        if settings.get("modules_to_convert"):
            reader.problem("key quantization_config.modules_to_convert is not supported: embeddings are not quantised")
        skipped = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
        if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
            reader.problem(f"key quantization_config.modules_to_not_convert must list names, found {skipped!r}")
            skipped = []
        for name in skipped:
            try:
                re.compile(name)
            except re.error as error:
                reader.problem(f"key quantization_config.modules_to_not_convert: {name!r} is no name ({error})")
        reader.finish()
        return cls(skipped=tuple(name.replace("language_model.", "") for name in skipped))

    def skips(self, name: str) -> bool:
        """True when module ``name``, or any that it joins, stays as it is."""
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{part}" for part in self.merged.get(leaf, (leaf,))]
        return any(re.search(rf"(?:^|\.)(?:{skipped})(?:\.|$)", name) for skipped in self.skipped for name in names)


def read_quantization(hf_config: Mapping[str, Any], asked: str | None) -> QuantConfig | None:
    """How the weights of a config.json are served when ``--quantization`` is ``asked`` ("fp8" or None)."""
    nested = hf_config.get("text_config")
    for place in (hf_config, nested) if isinstance(nested, dict) else (hf_config,):
        for key in ("quantization_config", "compression_config"):
            settings = place.get(key)
            if settings is None:
                continue
            method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
            if method != "fp8" or key != "quantization_config":
                raise ConfigError(
                    f"key {key} ({method}): such checkpoints are not supported. Use one in fp8 with blocks of "
                    f"[{BLOCK}, {BLOCK}], or in bfloat16, float16 or float32, with or without --quantization fp8."
                )
            return QuantConfig.from_hf(settings)
    return QuantConfig(on_load=True, skipped=SKIPPED_ON_LOAD) if asked == "fp8" else None
