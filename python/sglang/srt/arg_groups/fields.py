"""From a dataclass of annotated fields to flags: what a field declares about its flag, and how its text is parsed."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

_SI = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_IEC = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_KINDS = {bool: "bool", int: "int", float: "float", str: "str", list[int]: "ints", list[str]: "strs"}
_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
LISTS: dict[str, type] = {"ints": int, "strs": str}
_EXPECTED = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "ints": "integers",
    "strs": "texts",
}


@dataclass(frozen=True)
class Arg:
    """What a field of ServerArgs declares about its flag.

    ``choices`` may be a function, if other files declare them. ``upstream_only`` lists values that only upstream
    supports, so that the refusal can say so. ``minimum`` and ``maximum`` are inclusive; ``above`` and ``below`` are
    not. ``also`` holds values that are allowed outside the bounds.
    ``auto`` says what None resolves to. ``human`` accepts 128k or 1Mi.
    """

    help: str
    group: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()
    upstream_only: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    auto: str = ""
    metavar: str = ""
    human: bool = False


def flag(default: Any, help: str, group: str, **declared: Any) -> Any:
    """The declaration of a field of ServerArgs: its default, and what ``Arg`` says of its flag."""
    return field(default=default, metadata={"arg": Arg(help, group, **declared)})


@dataclass(frozen=True)
class FieldSpec:
    """One flag: its field, its option strings (the name first), the kind of its value and its default."""

    name: str
    flags: tuple[str, ...]
    kind: str
    optional: bool
    default: Any
    arg: Arg

    @property
    def flag(self) -> str:
        return self.flags[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted values; empty means any."""
        return self.arg.choices() if callable(self.arg.choices) else self.arg.choices

    def parse(self, values: list[str]) -> Any:
        """The typed value of the words after the flag; raises ValueError with flag, value and what is expected."""
        if self.kind in LISTS:
            if not values:
                raise ValueError(f"{self.flag} expects at least one of its {_EXPECTED[self.kind]}")
            return [self._parse_one(word) for word in values]
        return self._parse_one(values[0])

    def _parse_one(self, word: str) -> Any:
        if self.kind in ("str", "strs"):
            return word
        try:
            if self.kind == "float":
                return float(word)
            return human_int(word) if self.arg.human else int(word)
        except ValueError:
            expected = "an integer" if self.kind == "ints" else _EXPECTED[self.kind]
            hint = " (such as 4096, 128k or 1Mi)" if self.arg.human else ""
            raise ValueError(f"{self.flag} expects {expected}{hint}, got {word!r}") from None

    def problems(self, value: Any) -> list[str]:
        """What is wrong with ``value``: its type, a choice or a bound."""
        if value is None and self.optional:
            return []
        if not self._has_type(value):
            return [f"{self.flag} expects {_EXPECTED[self.kind]}, got {value!r}"]
        arg = self.arg
        if self.choices and value not in self.choices:
            known = ", ".join(self.choices)
            if value in arg.upstream_only:
                return [f"{self.flag} {value} is known from upstream but not implemented in this build: use {known}"]
            return [f"{self.flag} must be one of {known}, got {value!r}"]
        numbers = value if self.kind == "ints" else [value] if self.kind in ("int", "float") else []
        return [f"{self.flag} must be {self.bounds()}, got {value}" for value in numbers if not self._in_bounds(value)]

    def _has_type(self, value: Any) -> bool:
        if self.kind in LISTS:
            return isinstance(value, list) and all(type(item) is LISTS[self.kind] for item in value)
        # Also numpy's numbers and strings, which derive from Python's; a bool is not a number.
        return isinstance(value, _TYPES[self.kind]) and (self.kind == "bool" or not isinstance(value, bool))

    def _in_bounds(self, value: float) -> bool:
        arg = self.arg
        return value in arg.also or (
            (arg.minimum is None or value >= arg.minimum)
            and (arg.maximum is None or value <= arg.maximum)
            and (arg.above is None or value > arg.above)
            and (arg.below is None or value < arg.below)
        )

    def bounds(self) -> str:
        """The allowed range in words, or "" if any number is allowed."""
        arg = self.arg
        parts = [f"{number:g}" for number in arg.also]
        low = f"at least {arg.minimum:g}" if arg.minimum is not None else ""
        low = f"above {arg.above:g}" if arg.above is not None else low
        high = f"at most {arg.maximum:g}" if arg.maximum is not None else ""
        high = f"below {arg.below:g}" if arg.below is not None else high
        span = " and ".join(part for part in (low, high) if part)
        return " or ".join([*parts, span] if span else parts)


def human_int(word: str) -> int:
    """An integer, with the suffixes k, M, G, T (decimal) or Ki, Mi, Gi, Ti (binary); raises ValueError."""
    if match := re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", word):
        return int(match[1]) * _IEC[match[2]]
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT])", word):
        return round(float(match[1]) * _SI[match[2]])
    return int(word)


def field_specs(cls: Any) -> tuple[FieldSpec, ...]:
    """The flags of a dataclass whose fields are ``flag(...)``, as declared."""
    hints = typing.get_type_hints(cls)
    specs = []
    for one in fields(cls):
        base, arg = hints[one.name], one.metadata["arg"]
        optional = isinstance(base, types.UnionType) and type(None) in typing.get_args(base)
        if optional:
            base = next(member for member in typing.get_args(base) if member is not type(None))
        assert one.default is not MISSING, f"{one.name} needs a default"
        names = ("--" + one.name.replace("_", "-"), *arg.aliases)
        specs.append(FieldSpec(one.name, names, _KINDS[base], optional, one.default, arg))
    return tuple(specs)
