"""The kinds of environment variable: how one is declared, read, bounded, written and restored."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

TRUE_WORDS = ("1", "true", "yes", "y", "on")
FALSE_WORDS = ("0", "false", "no", "n", "off")


class EnvError(ValueError):
    """An environment variable has a value that its declaration does not allow."""


class EnvField(ABC, Generic[T]):
    """One declared variable; the attribute it is assigned to is its name.

    `minimum` is the least value of a number; `choices` lists all allowed values; `platform` is the only platform
    kind on which it acts ("cpu", "cuda", "hip"; empty: all); `pending` names the capability that will read it and that
    is not built yet; `requires` says in words what else must be set; a `secret` value is never printed.
    """

    kind = ""
    expected = "a value"

    def __init__(
        self,
        default: T,
        *,
        doc: str,
        minimum: float | None = None,
        choices: Sequence[str | int] = (),
        unit: str = "",
        platform: str = "",
        secret: bool = False,
        requires: str = "",
        pending: str = "",
    ) -> None:
        if not doc.strip():
            raise TypeError("an environment variable needs a doc")
        self.name = self.section = ""
        self.default: T = default
        self.doc, self.unit, self.requires, self.pending = doc, unit, requires, pending
        self.minimum, self.choices, self.platform, self.secret = minimum, tuple(choices), platform, secret
        self._warned = False

    def __set_name__(self, owner: type, name: str) -> None:
        if self.name:
            raise RuntimeError(f"{self.name} is already declared; {owner.__name__}.{name} cannot reuse its field")
        self.name = name

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, and the old one with the prefix SGL_, under which a variable of the engine is still found."""
        if not self.name.startswith("SGLANG_"):
            return (self.name,)
        return (self.name, "SGL_" + self.name.removeprefix("SGLANG_"))

    def find(self, environ: Mapping[str, str]) -> tuple[str, str] | None:
        """The (name, stripped text) that holds the value; None if unset. Empty text is unset; the new name wins."""
        for name in self.names:
            text = environ.get(name)
            if text is not None and text.strip():
                return name, text.strip()
        return None

    def read(self, environ: Mapping[str, str]) -> T:
        """The value in a given environment, or the default; raises EnvError if the text is not allowed."""
        found = self.find(environ)
        return self.default if found is None else self._parse_checked(*found)

    def get(self) -> T:
        """The value now, or the default if unset; raises EnvError rather than fall back."""
        found = self.find(os.environ)
        if found is not None and found[0] != self.name and not self._warned:
            self._warned = True
            warnings.warn(f"{found[0]} is an old name; set {self.name} instead", FutureWarning, stacklevel=2)
        return self.read(os.environ)

    def parse(self, text: str) -> T:
        """The value that a text stands for; raises EnvError if it is not allowed."""
        return self._parse_checked(self.name, text.strip())

    def is_set(self) -> bool:
        """True if the variable, or its old name, has a non-empty value."""
        return self.find(os.environ) is not None

    def set(self, value: T | str | None) -> None:
        """Write the value to os.environ, from which child processes inherit; None removes it, as `clear` does."""
        if value is None:
            return self.clear()
        text = value if isinstance(value, str) else self._format(value)
        if not text.strip():
            if self.default != "":
                raise EnvError(f"{self.name}: an empty value means unset, that is {self.default!r}; use clear()")
            return self.clear()
        self.parse(text)
        os.environ[self.name] = text

    def clear(self) -> None:
        """Remove the variable and its old name from os.environ."""
        for name in self.names:
            os.environ.pop(name, None)

    @contextmanager
    def override(self, value: T | str | None) -> Iterator[None]:
        """Set the value for the length of a with block; None means unset. The former state returns whatever happens."""
        saved = {name: os.environ.get(name) for name in self.names}
        self.set(value)
        try:
            yield
        finally:
            for name, text in saved.items():
                if text is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = text

    def describe(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(str(c) or '""' for c in self.choices)
        unit = f" ({self.unit})" if self.unit else ""
        least = "" if self.minimum is None else f" of at least {self.minimum:g}"
        return self.expected + least + unit

    def show(self, text: str) -> str:
        """The text, or a placeholder if the variable is secret."""
        return "<redacted>" if self.secret else text

    def default_text(self) -> str:
        """The default as it would be written in the environment; empty if there is none."""
        return self._format(self.default)

    def _parse_checked(self, name: str, text: str) -> T:
        try:
            value = self._parse(text)
        except ValueError as exc:
            raise self._refusal(name, text, str(exc)) from None
        if self.choices and value not in self.choices:
            raise self._refusal(name, text, "")
        if self.minimum is not None and isinstance(value, int) and value < self.minimum:
            raise self._refusal(name, text, "out of range")
        return value

    def _refusal(self, name: str, text: str, reason: str) -> EnvError:
        reason = f" ({reason})" if reason and not self.secret else ""
        default = self.default_text()
        hint = f"unset it for the default {default}" if default else "unset it for the default"
        return EnvError(f"{name}={self.show(text)!r} is not allowed{reason}; expected {self.describe()}, or {hint}")

    @abstractmethod
    def _parse(self, text: str) -> T:
        """The value that ``text`` stands for. Raises ValueError."""

    def _format(self, value: Any) -> str:
        return str(value)

    def __bool__(self) -> NoReturn:
        raise RuntimeError(f"envs.{self.name} is a declaration, not a value; call envs.{self.name}.get()")

    __len__ = __bool__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class EnvBool(EnvField[bool]):
    """True for 1, true, yes, y, on; False for 0, false, no, n, off; in any case of letters."""

    kind = "bool"
    expected = "true or false (1/0, yes/no, on/off)"

    def _parse(self, text: str) -> bool:
        word = text.lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
        raise ValueError("not a boolean")

    def _format(self, value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)


class EnvInt(EnvField[int]):
    """A whole number in decimal digits."""

    kind = "int"
    expected = "a whole number"

    def _parse(self, text: str) -> int:
        digits = text[1:] if text[0] in "+-" else text
        if not (digits.isascii() and digits.isdigit()):
            raise ValueError("not a whole number")
        return int(text)


class EnvStr(EnvField[str]):
    """Text without blanks at either end."""

    kind = "str"
    expected = "text"

    def _parse(self, text: str) -> str:
        return text


class EnvSection:
    """Variables that the documentation lists under one heading, `title`; a subclass declares them."""

    def __init_subclass__(cls, title: str = "") -> None:
        for field in vars(cls).values():
            if isinstance(field, EnvField):
                field.section = title
