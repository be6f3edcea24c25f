"""The launch check: every SGLANG_ and SGL_ name of an environment is classified, and its value checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt import environ_names as names
from sglang.srt.environ_fields import EnvError, EnvField

Fields = Mapping[str, EnvField[Any]]

# Kubernetes adds such names for each Service, so a Service called "sglang" brings SGLANG_PORT=tcp://... into every pod.
_SERVICE_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
# A name that differs from a declared one by at most so many letters is a misspelling of it.
MISSPELLING_EDITS = 2
_PLATFORM_NAMES = {"cpu": "CPU", "cuda": "CUDA", "hip": "AMD ROCm (hip)"}


@dataclass(frozen=True)
class EnvReport:
    """The result of a launch check: a launch with `errors` must not continue; `warnings` are logged once.

    `set_variables` maps the declared and foreign variables that have a value to their text, secrets redacted.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    set_variables: Mapping[str, str] = field(default_factory=dict)


class _Findings:
    """What a pass over the names has found; names that share a remark share a warning."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.set_variables: dict[str, str] = {}
        self._remarks: dict[str, list[str]] = {}

    def remark(self, name: str, text: str) -> None:
        """Note what holds of `name`; `text` writes its verbs as {has} and {is_}."""
        self._remarks.setdefault(text, []).append(name)

    def report(self) -> EnvReport:
        shared = []
        for text, about in self._remarks.items():
            has, is_ = ("has", "is") if len(about) == 1 else ("have", "are")
            shared.append(f"{', '.join(about)} {text.format(has=has, is_=is_)}")
        return EnvReport(tuple(self.errors), (*self.warnings, *shared), self.set_variables)


def check(environ: Mapping[str, str], fields: Fields, platform_kind: str | None) -> EnvReport:
    """Classify each SGLANG_ and SGL_ name; see `EnvReport`.

    A declared name is checked, a misspelt one is an error, one that would change numerics upstream is refused. Any
    other name is accepted with a warning that it has no effect.
    """
    if platform_kind is not None and platform_kind not in _PLATFORM_NAMES:
        raise ValueError(f"platform_kind {platform_kind!r} is none of {', '.join(_PLATFORM_NAMES)}")
    findings = _Findings()
    owners = {name: f for f in fields.values() for name in f.names}
    for name in sorted(n for n in environ if n.startswith(("SGLANG_", "SGL_"))):
        if name not in fields and (_SERVICE_LINK_NAME.search(name) or _SERVICE_LINK_VALUE.match(environ[name])):
            continue
        if name in owners:
            _check_own(owners[name], name, environ, platform_kind, findings)
        elif (known := names.lookup(name)) is not None:
            _check_upstream(*known, name, environ[name], findings)
        elif (meant := misspelt(name, fields)) is not None:
            findings.errors.append(f"unknown environment variable {name}; did you mean {meant}?")
        elif environ[name].strip():
            findings.remark(name, "{is_} unknown here and {has} no effect")
    for row in names.FOREIGN:
        if environ.get(row.name, "").strip():
            findings.set_variables[row.name] = environ[row.name]
    return findings.report()


def misspelt(name: str, fields: Fields) -> str | None:
    """The declared name that `name` misspells: the nearest within `MISSPELLING_EDITS`, whatever its case, or None."""
    wanted = names.canonical_name(name.upper())
    edits, nearest = min(((_edits(wanted, declared), declared) for declared in fields), default=(len(wanted), ""))
    return nearest if edits <= MISSPELLING_EDITS else None


def _edits(one: str, other: str) -> int:
    """Letters to add, drop or replace that make `other` of `one` (Levenshtein distance)."""
    if abs(len(one) - len(other)) > MISSPELLING_EDITS:
        return MISSPELLING_EDITS + 1
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        previous, row = row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != wanted)))
    return row[-1]


def _check_own(
    field_: EnvField[Any], name: str, environ: Mapping[str, str], kind: str | None, findings: _Findings
) -> None:
    """Check a declared variable that is set under `name`, its own or an old one."""
    found = field_.find(environ)
    if found is None or not environ[name].strip():
        return
    if found[0] != name:
        findings.warnings.append(f"{name} is an old name of {field_.name} and is ignored: {found[0]} is set too")
        return
    if name != field_.name:
        findings.warnings.append(f"{name} is an old name; set {field_.name} instead")
    try:
        field_.read(environ)
    except EnvError as exc:
        findings.errors.append(str(exc))
        return
    findings.set_variables[field_.name] = field_.show(found[1])
    if kind is not None and field_.platform and field_.platform != kind:
        there = _PLATFORM_NAMES.get(field_.platform, field_.platform)
        findings.remark(field_.name, f"{{has}} no effect on {kind}: only on {there}")
    elif field_.pending:
        findings.remark(field_.name, f"{{is_}} accepted and {{has}} no effect yet (waits for {field_.pending})")


def _check_upstream(kind: str, advice: str, name: str, value: str, findings: _Findings) -> None:
    advice = f"; {advice}" if advice else ""
    if kind == "numerics":
        if not names.asks_for_nothing(name, value):
            remedy = advice or "; unset it"
            findings.errors.append(f"{name}={value!r} would change results and is not implemented{remedy}")
    elif not value.strip():
        return
    elif kind == "rejected":
        findings.errors.append(f"{name} is not a variable of this engine{advice}")
    else:
        findings.warnings.append(f"{name} has no effect here{advice}")
