"""The error of a model config, and a reader that collects every problem of a config before it raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang.srt.utils import limits


class ConfigError(ValueError):
    """A model folder's configuration cannot be used; ``problems`` holds each reason, ``source`` the file."""

    def __init__(self, *problems: str, source: str | None = None) -> None:
        self.problems = list(problems)
        self.source = source
        text = problems[0] if len(problems) == 1 else "\n".join(["", *(f"  - {problem}" for problem in problems)])
        super().__init__(f"{source}: {text}" if source else text)


REQUIRED: Any = object()
_LARGEST = {
    "num_hidden_layers": limits.MAX_CONFIG_LAYERS,
    "vocab_size": limits.MAX_CONFIG_VOCAB,
    "max_position_embeddings": limits.MAX_CONFIG_POSITIONS,
    "original_max_position_embeddings": limits.MAX_CONFIG_POSITIONS,
}


class ConfigReader:
    """Typed reads from one JSON object; problems are collected, and ``finish`` raises one ConfigError with all.

    Every ``take_*`` returns a usable stand-in after a problem so that reading continues. An optional key may be absent
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

    def _take(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool], stand_in: Any) -> Any:
        value = self.data.get(key)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            state = "is null" if key in self.data else "is missing"
            self.problem(f"key {self.prefix}{key} {state} ({expected} expected)")
            return stand_in
        if not fits(value):
            self.problem(f"key {self.prefix}{key} must be {expected}, found {value!r:.200}")
            return stand_in
        return value

    def take_int(self, key: str, default: Any = REQUIRED, minimum: int = 1) -> Any:
        maximum = _LARGEST.get(key, limits.MAX_CONFIG_SIZE)
        expected = f"an integer of at least {minimum} and at most {maximum}"
        return self._take(key, default, expected, lambda v: type(v) is int and minimum <= v <= maximum, max(minimum, 1))

    def take_ints(self, *keys: str) -> dict[str, Any]:
        """Required positive integers by their keys."""
        return {key: self.take_int(key) for key in keys}

    def take_float(self, key: str, default: Any = REQUIRED, positive: bool = True) -> float:
        def fits(value: Any) -> bool:
            # Compared before it becomes a float: an integer of JSON may have any size.
            if type(value) not in (int, float) or not -limits.MAX_CONFIG_REAL <= value <= limits.MAX_CONFIG_REAL:
                return False
            return bool(value >= 1 / limits.MAX_CONFIG_REAL) or not positive

        kind = "a positive number" if positive else "a number"
        return float(self._take(key, default, f"{kind} of at most {limits.MAX_CONFIG_REAL:g}", fits, 1.0))

    def take_bool(self, key: str, default: Any = REQUIRED) -> bool:
        return bool(self._take(key, default, "true or false", lambda v: isinstance(v, bool), False))

    def take_choice(self, key: str, choices: Sequence[str], default: Any = REQUIRED) -> Any:
        return self._take(key, default, "one of " + ", ".join(choices), lambda v: v in choices, choices[0])
