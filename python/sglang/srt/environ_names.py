"""Names that the engine answers in a special way and does not declare: of upstream sglang and of other software.

environ_names.json holds them. Sources: upstream 0.4.3 to 0.5.23 and published launch recipes; MORI 1.2 and AITER 0.1
(read in source), the HIP runtime's and Hugging Face's documentation. A name leaves it when `environ.py` declares it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class EnvForeign(NamedTuple):
    """One variable of someone else: `default` is the owner's, empty if there is none; `owner` reads it."""

    name: str
    owner: str
    default: str
    doc: str


_NAMES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# Each maps names to advice, which may be empty. They change what is computed and stop a launch, unless off.
NUMERICS: dict[str, str] = _NAMES["numerics"]
# Renamed, or done here in another way: a warning that says which.
REPLACED: dict[str, str] = _NAMES["replaced"]
# Never part of a release; someone who sets one expects an effect that only another switch has.
REJECTED: dict[str, str] = _NAMES["rejected"]
# Values at which a numerics variable asks for what this engine does anyway, besides those of OFF_VALUES.
DEFAULTS: dict[str, str] = _NAMES["defaults"]
OFF_VALUES = frozenset({"", "0", "false", "no", "n", "off", "none", "null"})
# Variables that change how this engine runs on a machine; they are documented, never refused.
FOREIGN = tuple(EnvForeign(**row) for row in _NAMES["foreign"])


def canonical_name(name: str) -> str:
    """The SGLANG_ form of a name with the old SGL_ prefix; other names unchanged."""
    return "SGLANG_" + name[len("SGL_") :] if name.startswith("SGL_") else name


def lookup(name: str) -> tuple[str, str] | None:
    """(numerics, replaced or rejected; advice) for an upstream name, as given or in its SGLANG_ form; None: no such."""
    for candidate in dict.fromkeys((name, canonical_name(name))):
        for kind, table in (("numerics", NUMERICS), ("replaced", REPLACED), ("rejected", REJECTED)):
            if candidate in table:
                return kind, table[candidate]
    return None


def asks_for_nothing(name: str, value: str) -> bool:
    """True if a numerics variable has a value at which upstream computes what this engine computes."""
    text = value.strip().lower()
    return text in OFF_VALUES or text == DEFAULTS.get(canonical_name(name))
