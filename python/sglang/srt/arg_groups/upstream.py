"""Flags of upstream sglang (option strings of 0.5.12, and some of 0.5.23) that this engine lacks, and what they get.

A flag that would change what is computed, who may talk to the server, or the topology is refused. One that would not is
accepted, has no effect, and is named once at start. upstream.json lists both kinds by reason, one word per
flag: names joined by "|"; then "=" when a value follows, "=+" or "=*" for a list, "=?" for an optional one; then "~a,b"
for values that ask for nothing, with which a refused flag is accepted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# Values of our own flags, by field, that upstream knows and this engine lacks.
UPSTREAM_ONLY: dict[str, tuple[str, ...]] = {field: tuple(values) for field, values in _KNOWN["upstream_only"].items()}
# Names that vLLM, reports and users give to a setting: the flag that is meant here, or why none is needed.
MISNAMED: dict[str, str] = _KNOWN["misnamed"]


@dataclass(frozen=True)
class UpstreamFlag:
    """A flag that this engine lacks; ``nargs`` is 0, 1, "+", "*" or "?"; ``harmless`` values make a refusal moot."""

    names: tuple[str, ...]
    nargs: int | str
    refused: bool
    reason: str
    harmless: tuple[str, ...]


@functools.cache
def upstream_flags() -> dict[str, UpstreamFlag]:
    """Every unsupported flag of upstream, by each of its names."""
    result: dict[str, UpstreamFlag] = {}
    for kind in ("refused", "no_effect"):
        for reason, words in _KNOWN[kind].items():
            for word in words:
                spec, _, harmless = word.partition("~")
                names, equals, shape = spec.partition("=")
                flag = UpstreamFlag(
                    names=tuple(names.split("|")),
                    nargs=(shape or 1) if equals else 0,
                    refused=kind == "refused",
                    reason=reason,
                    harmless=tuple(harmless.split(",")) if harmless else (),
                )
                result.update(dict.fromkeys(flag.names, flag))
    return result


def distinct_flags() -> list[UpstreamFlag]:
    """Every unsupported flag of upstream once, in the order of the tables."""
    return list(dict.fromkeys(upstream_flags().values()))


def verdicts(given: Iterable[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
    """(errors, warnings) for unsupported flags, by their reasons; flags with the same reason share a line."""
    lines: dict[tuple[bool, str], list[str]] = {}
    for name, words in given:
        flag = upstream_flags()[name]
        if len(words) != 1 or words[0] not in flag.harmless:
            shown = name if flag.nargs == 0 or len(words) != 1 else f"{name} {words[0]}"
            shared = lines.setdefault((flag.refused, flag.reason), [])
            if shown not in shared:
                shared.append(shown)
    errors, warnings = [], []
    for (refused, reason), names in lines.items():
        if refused:
            errors.append(f"{_list(names)} {'is' if len(names) == 1 else 'are'} refused: {reason}")
        else:
            warnings.append(f"{_list(names)} {'has' if len(names) == 1 else 'have'} no effect: {reason}")
    return errors, warnings


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
