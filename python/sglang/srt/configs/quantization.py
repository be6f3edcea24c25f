"""What a config.json says of quantised weights: 8-bit floats with scales by blocks, or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sglang.srt.configs.errors import ConfigError, ConfigReader


class BlockShape(NamedTuple):
    """Rows and columns of a matrix that share one entry of a tensor."""

    rows: int
    columns: int

    def entries(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many such blocks a matrix of ``shape`` has; a last one may be partial. Other shapes are their own."""
        if len(shape) != 2:
            return shape
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


@dataclass(frozen=True)
class WeightFormat:
    """A format of quantised matrices: ``block`` shares a scale, which the checkpoint keeps under the matrix's name and
    ``scale_suffix``."""

    name: str
    block: BlockShape
    scale_suffix: str


# 8-bit floats with a scale for each 128x128 block, which multiplies, despite its name.
FP8_BLOCKS = WeightFormat("fp8", BlockShape(128, 128), "_scale_inv")
BLOCK = FP8_BLOCKS.block.rows
# Matrices of a few rows, which published checkpoints leave alone too; routers and heads are never quantised.
SKIPPED_ON_LOAD = ("in_proj_a", "in_proj_b")


@dataclass(frozen=True)
class QuantConfig:
    """The format of each module's matrices: ``default``, but where ``by_module`` or ``skipped`` says otherwise.

    on_load: the checkpoint is not quantised, and its matrices are while they load. skipped: regular expressions over
    names of modules that stay as they are. merged: checkpoint names of the modules that one module of the model joins.
    by_module: formats by regular expression over names of modules; the first that fits counts.
    """

    on_load: bool = False
    skipped: tuple[str, ...] = ()
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: WeightFormat = FP8_BLOCKS
    by_module: tuple[tuple[str, WeightFormat], ...] = ()

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

    def format_of(self, name: str) -> WeightFormat | None:
        """The format of module ``name``; None when it, or any that it joins, stays as it is.

        Raises ConfigError when it joins matrices of several formats.
        """
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{part}" for part in self.merged.get(leaf, (leaf,))]
        if any(_names(skipped, each) for skipped in self.skipped for each in names):
            return None
        formats = {
            next((known for pattern, known in self.by_module if _names(pattern, each)), self.default): each
            for each in names
        }
        if len(formats) > 1:
            found = " and ".join(f"{each} in {known.name}" for known, each in formats.items())
            raise ConfigError(f"quantization_config holds {found}, which are one product here: they need one format")
        return next(iter(formats))


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches whole parts of the module name ``name``."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


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
