"""The error of a model config, and a reader that collects every problem of a config before it raises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A model folder's configuration cannot be used; ``problems`` holds each reason, ``source`` the file."""

    def __init__(self, *problems: str, source: str | None = None) -> None:
        self.problems = list(problems)
        self.source = source
        text = problems[0] if len(problems) == 1 else "\n".join(["", *(f"  - {problem}" for problem in problems)])
        super().__init__(f"{source}: {text}" if source else text)


def _in_range(value: float, positive: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not positive)


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


class ConfigReader:
    """Typed reads from one JSON object; problems are collected, and ``finish`` raises one ConfigError with all.

    Every ``take_*`` returns a usable stand-in after a problem so that reading goes on. An optional key may be absent
    or null; then the default is returned.
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self.data = data
        self.prefix = prefix
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def finish(self) -> None:
        if self.problems:
            raise ConfigError(*self.problems)

    def _value(self, key: str, default: Any, expected: str) -> tuple[bool, Any]:
        """(present and not null, value); an absent required key is recorded as a problem."""
        value = self.data.get(key)
        if value is not None:
            return True, value
        if default is REQUIRED:
            state = "is null" if key in self.data else "is missing"
            self.problem(f"key {self.prefix}{key} {state} ({expected} expected)")
        return False, default

    def _bad(self, key: str, value: Any, expected: str) -> None:
        self.problem(f"key {self.prefix}{key} must be {expected}, found {value!r}")

    def take_int(self, key: str, default: Any = REQUIRED, minimum: int = 1) -> Any:
        expected = f"an integer of at least {minimum}"
        present, value = self._value(key, default, expected)
        if not present:
            return 1 if value is REQUIRED else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self._bad(key, value, expected)
            return max(minimum, 1)
        return value

    def take_float(self, key: str, default: Any = REQUIRED, positive: bool = True) -> Any:
        expected = "a positive number" if positive else "a number"
        present, value = self._value(key, default, expected)
        if not present:
            return 1.0 if value is REQUIRED else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _in_range(value, positive):
            self._bad(key, value, expected)
            return 1.0
        return float(value)

    def take_bool(self, key: str, default: Any = REQUIRED) -> Any:
        present, value = self._value(key, default, "true or false")
        if not present:
            return False if value is REQUIRED else value
        if not isinstance(value, bool):
            self._bad(key, value, "true or false")
            return False
        return value

    def take_choice(self, key: str, choices: Sequence[str], default: Any = REQUIRED) -> Any:
        expected = "one of " + ", ".join(choices)
        present, value = self._value(key, default, expected)
        if not present:
            return choices[0] if value is REQUIRED else value
        if value not in choices:
            self._bad(key, value, expected)
            return choices[0]
        return value
