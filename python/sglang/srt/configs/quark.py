"""What a quantization_config of AMD Quark asks for: MXFP4 and plain matrices; anything else is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sglang.srt.configs.errors import ConfigReader

# Keys that say how the checkpoint was made, and nothing of what it holds.
_ABOUT = ("quant_method", "quant_mode", "version", "algo_config", "export", "kv_cache_post_rope", "softmax_quant_spec")
# What a group of weights, and of activations quantised as they come, is said to be in MXFP4.
_MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
_FIX = "use a checkpoint whose experts alone are MXFP4 and the rest bfloat16, or one in fp8 with 128x128 blocks"


def read_quark(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Modules that stay plain, modules that are MXFP4 whatever the rest is, and whether rows may be MXFP4 too.

    The first two are regular expressions over names of modules; all other modules are MXFP4. Raises ConfigError that
    names every key that asks for something else.
    """
    reader = ConfigReader(settings, "quantization_config.")
    for key, value in settings.items():
        if key in (*_ABOUT, "global_quant_config", "layer_quant_config", "exclude"):
            continue
        if value:
            reader.problem(f"key quantization_config.{key} = {value!r:.100} is not served: {_FIX}")
    _check_export(settings.get("export"), reader)
    plain = [_pattern(name) for name in _names_of(settings.get("exclude"), reader)]
    four_bit = []
    rows = _read_layers(settings.get("global_quant_config"), "global_quant_config", reader)
    for name, layers in (settings.get("layer_quant_config") or {}).items():
        if isinstance(layers, dict) and layers.get("weight") is None and not layers.get("input_tensors"):
            plain.append(_pattern(name))
        else:
            rows = _read_layers(layers, f"layer_quant_config.{name}", reader) and rows
            four_bit.append(_pattern(name))
    for pattern in (*plain, *four_bit):
        try:
            re.compile(pattern)
        except re.error as error:
            reader.problem(f"key quantization_config: {pattern!r} is no name ({error})")
    reader.finish()
    return tuple(plain), tuple(four_bit), rows


def _check_export(export: Any, reader: ConfigReader) -> None:
    if not isinstance(export, dict):
        return
    for key, known in (("weight_format", ("real_quantized",)), ("pack_method", ("reorder", "order"))):
        if export.get(key) is not None and export[key] not in known:
            reader.problem(f"key quantization_config.export.{key} = {export[key]!r:.100} is not served: {_FIX}")
    if export.get("kv_cache_group"):
        reader.problem("key quantization_config.export.kv_cache_group is not served: use --kv-cache-dtype fp8_e4m3")


def _names_of(exclude: Any, reader: ConfigReader) -> list[str]:
    names = exclude or []
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    reader.problem(f"key quantization_config.exclude must list names, found {exclude!r:.100}")
    return []


def _read_layers(layers: Any, where: str, reader: ConfigReader) -> bool:
    """Whether layers of MXFP4 weights may have rows in MXFP4; problems for layers of any other kind."""
    where = f"quantization_config.{where}"
    if not isinstance(layers, dict):
        reader.problem(f"key {where} must be an object, found {layers!r:.100}")
        return False
    weight, rows = layers.get("weight"), layers.get("input_tensors")
    if not _is_mxfp4(weight):
        found = {key: weight.get(key) for key in _MXFP4} if isinstance(weight, dict) else weight
        reader.problem(f"key {where}.weight must be MXFP4 ({_MXFP4}), found {found!r:.200}: {_FIX}")
    for key in ("output_tensors", "bias"):
        if layers.get(key):
            reader.problem(f"key {where}.{key} is not served: {_FIX}")
    if rows is None:
        return False
    if not isinstance(rows, dict) or rows.get("is_dynamic") is not True:
        reader.problem(f"key {where}.input_tensors must be quantised as they come (is_dynamic), found {rows!r:.100}")
        return False
    return _is_mxfp4(rows)


def _is_mxfp4(spec: Any) -> bool:
    return isinstance(spec, dict) and all(spec.get(key) == value for key, value in _MXFP4.items())


def _pattern(name: str) -> str:
    """A regular expression for a name of Quark's: one after "re:", or parts of it with stars.

    Single experts stand for all of their module, whose matrices have one format.
    """
    if name.startswith("re:"):
        return name.removeprefix("re:").replace(r"language_model\.", "").replace("language_model.", "")
    name = re.sub(r"\.experts\.(\d+|\*)(\..*)?$", ".experts", name.replace("language_model.", ""))
    return ".*".join(map(re.escape, name.removeprefix("*").removeprefix(".").removesuffix(".*").split("*")))
