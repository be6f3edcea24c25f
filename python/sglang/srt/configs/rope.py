"""Rotary embedding parameters, read from either of the two spellings that config.json files use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.errors import ConfigReader

# "mrope" with text positions only is the default rotary embedding.
_ROPE_TYPES = ("default", "yarn", "mrope")
# Keys that change the angles or their scale in ways that this engine does not compute.
_REFUSED_KEYS = {"attention_factor": None, "truncate": True, "short_factor": None, "long_factor": None}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: "default", or "yarn" with its ramp and magnitude terms.

    ``theta`` is the base; ``factor`` the context extension; ``original_max_position_embeddings`` the length of
    pretraining in tokens; ``mscale`` and ``mscale_all_dim`` the YaRN magnitude terms (1 and 0 when absent).
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        """YaRN's m(a) = 0.1 a ln(factor) + 1, and 1 without extension."""
        if self.rope_type != "yarn" or self.factor <= 1.0:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by: m(mscale) / m(mscale_all_dim)."""
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)


def rope_section(reader: ConfigReader) -> tuple[str, dict[str, Any] | None]:
    """(key, nested object merged over ``rope_theta`` and similar keys next to it); None when the object is not one."""
    data = reader.data
    nested = [(key, data[key]) for key in ("rope_parameters", "rope_scaling") if data.get(key) is not None]
    for key, value in nested:
        if not isinstance(value, dict):
            reader.problem(f"key {reader.prefix}{key} must be an object, found {value!r}")
            return key, None
    if len(nested) == 2 and nested[0][1] != nested[1][1]:
        names = " and ".join(f"{reader.prefix}{key}" for key, _ in nested)
        reader.problem(f"keys {names} disagree: keep one of them")
    key, section = nested[0] if nested else ("", {})
    beside = {name: data[name] for name in ("rope_theta", "partial_rotary_factor") if data.get(name) is not None}
    return key, {**beside, **{name: value for name, value in section.items() if value is not None}}


def read_rope(reader: ConfigReader) -> RopeConfig:
    """The RopeConfig of a config object; problems go to ``reader``."""
    key, section = rope_section(reader)
    if section is None:
        return RopeConfig()
    inner = ConfigReader(section, f"{reader.prefix}{key}." if key else reader.prefix)
    rope = read_rope_section(inner, reader.data)
    reader.problems += inner.problems
    return rope


def read_rope_section(inner: ConfigReader, config: Mapping[str, Any]) -> RopeConfig:
    """The RopeConfig of one object of rotary parameters in ``config``; problems go to ``inner``."""
    section = {"rope_type": inner.data["type"], **inner.data} if "type" in inner.data else inner.data
    typed = ConfigReader(section, inner.prefix)
    rope_type = typed.take_choice("rope_type", _ROPE_TYPES, "default")
    theta = typed.take_float("rope_theta")
    if rope_type != "yarn" and section.get("factor", 1) != 1 and not typed.problems:
        typed.problem(f"key {inner.prefix}factor = {section['factor']!r} needs rope_type yarn, found {rope_type}")
    for name, harmless in _REFUSED_KEYS.items():
        if section.get(name, harmless) != harmless:
            typed.problem(f"key {inner.prefix}{name} = {section[name]!r} is not supported: it changes the angles")
    rope = _read_yarn(typed, theta, config) if rope_type == "yarn" else RopeConfig(theta=theta)
    inner.problems += typed.problems
    return rope


def _read_yarn(inner: ConfigReader, theta: float, config: Mapping[str, Any]) -> RopeConfig:
    full_length = config.get("max_position_embeddings")
    rope = RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=inner.take_float("factor"),
        original_max_position_embeddings=inner.take_int(
            "original_max_position_embeddings", full_length if isinstance(full_length, int) else 0
        ),
        beta_fast=inner.take_float("beta_fast", 32.0),
        beta_slow=inner.take_float("beta_slow", 1.0),
        mscale=inner.take_float("mscale", 1.0, positive=False),
        mscale_all_dim=inner.take_float("mscale_all_dim", 0.0, positive=False),
    )
    # With one of the two alone, published implementations differ in the scale of cos and sin.
    if (rope.mscale != 1.0) != (rope.mscale_all_dim != 0.0) and not {"mscale", "mscale_all_dim"} <= inner.data.keys():
        inner.problem(f"keys {inner.prefix}mscale and {inner.prefix}mscale_all_dim must be given together")
    return rope
