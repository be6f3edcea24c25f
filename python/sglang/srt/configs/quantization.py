"""The quantisation declared by config.json: 8-bit floats with block scales or MXFP4; others are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sglang.srt.configs.errors import ConfigError, ConfigReader
from sglang.srt.configs.quark import read_quark


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
    ``scale_suffix``.

    four_bit_rows: the checkpoint was made for rows of activations that are rounded to MXFP4 as they come.
    """

    name: str
    block: BlockShape
    scale_suffix: str
    four_bit_rows: bool = False


# 8-bit floats with a scale for each 128x128 block, which multiplies, despite its name.
FP8_BLOCKS = WeightFormat("fp8", BlockShape(128, 128), "_scale_inv")
BLOCK = FP8_BLOCKS.block.rows
# Four-bit floats, two to a byte along a row, with a power of two for each 32 of a row: as DeepSeek V4 names them, and
# as Quark does.
MXFP4 = WeightFormat("mxfp4", BlockShape(1, 32), "_scale_inv")
QUARK_MXFP4 = WeightFormat("mxfp4", BlockShape(1, 32), "_scale")
EXPERTS = "experts"
# Matrices of a few rows, which published checkpoints leave alone too; routers and heads are never quantised.
SKIPPED_ON_LOAD = ("in_proj_a", "in_proj_b")


@dataclass(frozen=True)
class QuantConfig:
    """The format of each module's matrices: ``default``, but where ``by_module`` or ``skipped`` says otherwise.

    on_load: the checkpoint is not quantised, and its matrices are while they load. skipped: regular expressions over
    names of modules that stay as they are. merged: checkpoint names of the modules that one module of the model joins.
    by_module: formats by regular expression over names of modules; the first that fits counts. dequantize_mxfp4: such
    matrices become plain while they load.
    """

    on_load: bool = False
    skipped: tuple[str, ...] = ()
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: WeightFormat = FP8_BLOCKS
    by_module: tuple[tuple[str, WeightFormat], ...] = ()
    dequantize_mxfp4: bool = False

    @property
    def method(self) -> str:
        """What --quantization says of it."""
        return "quark" if self.default.scale_suffix == QUARK_MXFP4.scale_suffix else "fp8"

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> QuantConfig:
        """Read a quantization_config; raises ConfigError that names every key that asks for something else.

        ``scale_fmt`` tells how the scales were rounded when the checkpoint was made; those of activations stay float32.
        """
        reader = ConfigReader(settings, "quantization_config.")
        for key, known in (("fmt", ("e4m3",)), ("activation_scheme", ("dynamic",))):
            reader.take_choice(key, known, known[0])
        expert_dtype = reader.take_choice("expert_dtype", ("fp8", "fp4"), "fp8")
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
        by_module = ((EXPERTS, MXFP4),) if expert_dtype == "fp4" else ()
        return cls(skipped=tuple(name.replace("language_model.", "") for name in skipped), by_module=by_module)

    @classmethod
    def from_quark(cls, settings: Mapping[str, Any]) -> QuantConfig:
        """Read a quantization_config of Quark; raises ConfigError that names every key that is not served."""
        plain, four_bit, rows = read_quark(settings)
        known = replace(QUARK_MXFP4, four_bit_rows=rows)
        return cls(skipped=plain, default=known, by_module=tuple((pattern, known) for pattern in four_bit))

    def with_experts(self, by_layer: Mapping[int, str]) -> QuantConfig:
        """This config with the routed experts of each layer in the format that the checkpoint's files have them in."""
        plain = tuple(rf"layers\.{layer}\.mlp\.experts" for layer, known in by_layer.items() if known == "plain")
        formats = {"fp8": FP8_BLOCKS, "mxfp4": MXFP4}
        by_module = tuple(
            (rf"layers\.{layer}\.mlp\.experts", formats[known]) for layer, known in by_layer.items() if known in formats
        )
        return replace(self, skipped=(*self.skipped, *plain), by_module=(*by_module, *self.by_module))

    def format_of(self, name: str) -> WeightFormat | None:
        """Format of ``name``; None if it, or any that it joins, is plain. Raises ConfigError if these differ."""
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
            raise ConfigError(
                f"quantization_config holds {found}, which are multiplied as one matrix here: they need the same format"
            )
        return next(iter(formats))


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches whole parts of the module name ``name``."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def read_quantization(hf_config: Mapping[str, Any], asked: str | None) -> QuantConfig | None:
    """How the weights of a config.json are served when ``--quantization`` is ``asked`` ("fp8", "quark" or None)."""
    nested = hf_config.get("text_config")
    for place in (hf_config, nested) if isinstance(nested, dict) else (hf_config,):
        for key in ("quantization_config", "compression_config"):
            settings = place.get(key)
            if settings is None:
                continue
            method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
            if method not in ("fp8", "quark") or key != "quantization_config":
                raise ConfigError(
                    f"key {key} ({method}): such checkpoints are not supported. Use one in fp8 with blocks of "
                    f"[{BLOCK}, {BLOCK}], one of Quark in MXFP4, or one in bfloat16, float16 or float32, with or "
                    "without --quantization fp8."
                )
            if method == "quark":
                return QuantConfig.from_quark(settings)
            if asked == "quark":
                raise ConfigError("--quantization quark does not fit this checkpoint, which is in fp8: remove the flag")
            # DeepSeek V4 has this key next to quantization_config, not in it.
            beside = {key: place[key] for key in ("expert_dtype",) if place.get(key) in ("fp4", "fp8")}
            return QuantConfig.from_hf({**beside, **settings})
    if asked == "quark":
        raise ConfigError(
            "--quantization quark is for checkpoints of Quark, but config.json has no quantization_config"
        )
    if hf_config.get("expert_dtype") == "fp4":
        raise ConfigError("key expert_dtype is fp4, but there is no quantization_config: add it")
    return QuantConfig(on_load=True, skipped=SKIPPED_ON_LOAD) if asked == "fp8" else None
