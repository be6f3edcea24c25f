"""The launch check: every SGLANG_ and SGL_ name of an environment is classed, and its value checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt import environ_upstream as upstream
from sglang.srt.environ_fields import EnvError, EnvField
from sglang.srt.environ_foreign import FOREIGN

Fields = Mapping[str, EnvField[Any]]

# Kubernetes adds such names for each Service, so a Service called "sglang" brings SGLANG_PORT=tcp://... into every pod.
_SERVICE_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
_PLATFORM_NAMES = {"cpu": "CPU", "cuda": "CUDA", "hip": "AMD ROCm (hip)"}


@dataclass(frozen=True)
class EnvReport:
    """The verdict of a launch check: a launch with `errors` must not go on; `warnings` are for the log, once.

    `set_variables` maps the declared and foreign variables that have a value to their text, secrets redacted.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    set_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if nothing stops the launch."""
        return not self.errors


class _Findings:
    """What a pass over the names has found; names that share a verdict share a warning."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.set_variables: dict[str, str] = {}
        self.ignored: list[str] = []
        self.other_platform: dict[str, list[str]] = {}
        self.pending: dict[str, list[str]] = {}

    def report(self, platform_kind: str | None) -> EnvReport:
        warnings = list(self.warnings)
        for platform, names in self.other_platform.items():
            there = _PLATFORM_NAMES.get(platform, platform)
            warnings.append(f"{_list(names)} {_has(names)} no effect on {platform_kind}: only on {there}")
        for capability, names in self.pending.items():
            warnings.append(
                f"{_list(names)} {_are(names)} accepted and {_has(names)} no effect yet (waits for {capability})"
            )
        if self.ignored:
            are = _are(self.ignored)
            warnings.append(f"{_list(self.ignored)} {are} known from upstream and not implemented here: no effect")
        return EnvReport(tuple(self.errors), tuple(warnings), self.set_variables)


def check(environ: Mapping[str, str], fields: Fields, platform_kind: str | None) -> EnvReport:
    """Class each SGLANG_ and SGL_ name: declared, known from upstream, or an error; see `EnvReport`."""
    if platform_kind is not None and platform_kind not in _PLATFORM_NAMES:
        raise ValueError(f"platform_kind {platform_kind!r} is none of {', '.join(_PLATFORM_NAMES)}")
    findings = _Findings()
    owners = {old: f for f in fields.values() for old in f.old_names}
    for name in sorted(n for n in environ if n.startswith(("SGLANG_", "SGL_"))):
        if name in fields:
            _check_declared(fields[name], environ, platform_kind, findings)
        elif _SERVICE_LINK_NAME.search(name) or _SERVICE_LINK_VALUE.match(environ[name]):
            continue
        elif name in owners:
            _check_old_name(owners[name], name, environ, platform_kind, findings)
        elif (known := upstream.lookup(name)) is not None:
            _check_upstream(known, name, environ[name], findings)
        else:
            findings.errors.append(f"unknown environment variable {name}{suggestion(name, fields)}")
    for row in FOREIGN:
        if environ.get(row.name, "").strip():
            findings.set_variables[row.name] = environ[row.name]
    return findings.report(platform_kind)


def suggestion(name: str, fields: Fields) -> str:
    """`; did you mean X?` for the nearest declared name, else the nearest of upstream, else where to find the list."""
    wanted = upstream.canonical_name(name).upper()
    for names, cutoff in ((fields, 0.8), (_upstream_names(), 0.85)):
        close = difflib.get_close_matches(wanted, list(names), n=1, cutoff=cutoff)
        if close:
            return f"; did you mean {close[0]}?"
    return "; `python -m sglang.srt.environ --list` shows all names"


def _upstream_names() -> Iterable[str]:
    special = (upstream.NUMERICS_NAMES, upstream.REPLACED_NAMES, upstream.REJECTED_NAMES)
    return [*upstream.IGNORED_NAMES, *(name for table in special for name in table)]


def _check_declared(field_: EnvField[Any], environ: Mapping[str, str], kind: str | None, findings: _Findings) -> None:
    found = field_.find(environ)
    if found is None or found[0] != field_.name:
        return
    try:
        field_.read(environ)
    except EnvError as exc:
        findings.errors.append(str(exc))
        return
    findings.set_variables[field_.name] = field_.show(found[1])
    if kind is not None and field_.platform and field_.platform != kind:
        findings.other_platform.setdefault(field_.platform, []).append(field_.name)
    elif field_.pending:
        findings.pending.setdefault(field_.pending, []).append(field_.name)


def _check_old_name(
    field_: EnvField[Any], name: str, environ: Mapping[str, str], kind: str | None, findings: _Findings
) -> None:
    found = field_.find(environ)
    if found is None or not environ[name].strip():
        return
    if found[0] != name:
        findings.warnings.append(f"{name} is an old name of {field_.name} and is ignored: {found[0]} is set too")
        return
    findings.warnings.append(f"{name} is an old name; set {field_.name} instead")
    try:
        field_.read(environ)
    except EnvError as exc:
        findings.errors.append(str(exc))
        return
    _check_declared(field_, {field_.name: found[1]}, kind, findings)


def _check_upstream(known: upstream.UpstreamName, name: str, value: str, findings: _Findings) -> None:
    advice = f"; {known.advice}" if known.advice else ""
    if known.kind == upstream.NUMERICS:
        if not upstream.asks_for_nothing(name, value):
            remedy = advice or "; unset it"
            findings.errors.append(f"{name}={value!r} would change what is computed and is not implemented{remedy}")
    elif not value.strip():
        return
    elif known.kind == upstream.REJECTED:
        findings.errors.append(f"{name} is not a variable of this engine{advice}")
    elif known.kind == upstream.REPLACED:
        findings.warnings.append(f"{name} has no effect here{advice}")
    else:
        findings.ignored.append(name)


def _list(names: list[str]) -> str:
    return ", ".join(names)


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
