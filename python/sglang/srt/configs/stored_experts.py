"""In which format a checkpoint holds its routed experts, read from the headers of its files: no weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sglang.srt.configs.errors import ConfigError

# A header is JSON after its length in 8 bytes; safetensors allows no longer one.
MAX_HEADER_BYTES = 100_000_000
_EXPERT = re.compile(r"(?:^|\.)(?P<group>layers|mtp)\.(?P<number>\d+)\..*\bexperts\.\d+\.\w+\.weight$")
_FORMATS = {"F8_E4M3": "fp8", "U8": "mxfp4", "I8": "mxfp4", "F4": "mxfp4"}


def stored_experts(folder: Path, num_layers: int) -> dict[int, str]:
    """Layer -> "fp8", "mxfp4" or "plain" by the dtypes of its routed experts; layers that draft follow the others.

    Empty without readable files, which the loader names. Raises ConfigError for a layer that has several.
    """
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, dtype in _dtypes(path).items():
            match = _EXPERT.search(name)
            if match is not None:
                layer = int(match["number"]) + (num_layers if match["group"] == "mtp" else 0)
                found.setdefault(layer, {}).setdefault(_FORMATS.get(dtype, "plain"), name)
    mixed = {layer: formats for layer, formats in found.items() if len(formats) > 1}
    if mixed:
        examples = "; ".join(
            " but ".join(f"{name} is {known}" for known, name in formats.items()) for formats in mixed.values()
        )
        raise ConfigError(
            f"{len(mixed)} layers have routed experts of several formats ({examples:.400}). Each layer needs one "
            "format: convert all its experts alike",
            source=str(folder),
        )
    return {layer: next(iter(formats)) for layer, formats in found.items()}


def _dtypes(path: Path) -> dict[str, str]:
    """The dtype of each tensor of a file; {} for one that is no safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else {}
        return {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
