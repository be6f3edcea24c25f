"""The command line of `sglang.srt.environ` and the documentation page that is generated from the declarations."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang.srt import environ_names as known
from sglang.srt.environ_check import check
from sglang.srt.environ_fields import EnvField

Fields = Mapping[str, EnvField[Any]]


def main(argv: Sequence[str] | None, fields: Fields) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang.srt.environ", description="Show or check the variables.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="names, types, defaults and values that are set")
    action.add_argument("--markdown", action="store_true", help="the documentation page")
    action.add_argument("--json", action="store_true", help="all declarations, for programs")
    action.add_argument(
        "--check", action="store_true", help="check this environment; exit 2 if a server would refuse it"
    )
    parser.add_argument("--platform", choices=("cpu", "cuda", "hip"), help="with --check: platform kind to check for")
    args = parser.parse_args(argv)
    if args.check:
        return _print_check(fields, args.platform)
    if args.markdown:
        print(render_markdown(fields), end="")
    elif args.json:
        print(json.dumps(describe_all(fields), indent=2))
    else:
        _print_list(fields)
    return 0


def _print_check(fields: Fields, platform_kind: str | None) -> int:
    report = check(os.environ, fields, platform_kind)
    for warning in report.warnings:
        print(f"warning: {warning}")
    for error in report.errors:
        print(f"error: {error}", file=sys.stderr)
    if report.errors:
        return 2
    print(f"environment ok: {len(report.set_variables)} known variable(s) set")
    for name, text in report.set_variables.items():
        print(f"  {name}={text}")
    return 0


def _print_list(fields: Fields) -> None:
    width = max(len(name) for name in fields)
    for name, field in fields.items():
        found = field.find(os.environ)
        default = field.default_text() or "-"
        now = f"  (set: {field.show(found[1])})" if found else ""
        notes = "".join(f" [{note}]" for note in (field.platform, "no effect yet" if field.pending else "") if note)
        print(f"{name:<{width}}  {field.kind:<5}  {default}{notes}{now}")


def describe_all(fields: Fields) -> dict[str, list[dict[str, Any]]]:
    """Declarations and foreign rows as plain data; holds no values of this environment."""
    same = (
        "default", "doc", "section", "minimum", "maximum", "choices", "unit", "platform", "secret", "deprecated_names",
        "requires", "effective", "pending",
    )  # fmt: skip
    declared = [
        {"name": name, "type": field.kind, "allowed": field.describe(), **{key: getattr(field, key) for key in same}}
        for name, field in fields.items()
    ]
    return {"variables": declared, "foreign": [row._asdict() for row in known.FOREIGN]}


def render_markdown(fields: Fields) -> str:
    """The whole page docs/references/environment_variables.md, from its text in environ_page.txt."""
    sections = []
    for section in dict.fromkeys(field.section for field in fields.values()):
        rows = [_row(name, _describe(f), f.default_text()) for name, f in fields.items() if f.section == section]
        sections.append(f"## {section}\n\n{_table(rows)}")
    amd = {name: f.section for name, f in fields.items() if f.platform == "hip"}
    refused = {name: _refusal_note(name, advice) for name, advice in known.NUMERICS.items()}
    page = Path(__file__).with_name("environ_page.txt").read_text(encoding="utf-8")
    return page.format(
        sections="\n".join(sections),
        amd_sections=" and ".join(f"[{s}](#{_anchor(s)})" for s in dict.fromkeys(amd.values())),
        amd_names="\n".join(f"- `{name}`" for name in amd),
        foreign=_table([_row(row.name, f"{row.doc} Owner: {row.owner}.", row.default) for row in known.FOREIGN]),
        refused=_bullets(refused),
        rejected=_bullets(known.REJECTED),
        replaced=_bullets(known.REPLACED),
    )


def _refusal_note(name: str, advice: str) -> str:
    accepted = f"accepted at `{known.DEFAULTS[name]}`" if name in known.DEFAULTS else ""
    return "; ".join(filter(None, (accepted, advice)))


def _bullets(notes: Mapping[str, str]) -> str:
    return "\n".join(f"- `{name}`{': ' + note if note else ''}" for name, note in sorted(notes.items()))


def _describe(field: EnvField[Any]) -> str:
    sentences = [field.doc]
    if field.choices:
        sentences.append("One of " + ", ".join(f"`{c}`" for c in field.choices if c != "") + ".")
    elif field.unit or field.minimum is not None or field.maximum is not None:
        allowed = field.describe()
        sentences.append(allowed[0].upper() + allowed[1:] + ".")
    if field.requires:
        sentences.append(f"Requires {field.requires}.")
    if field.platform:
        sentences.append({"hip": "AMD ROCm only.", "cuda": "CUDA only.", "cpu": "CPU only."}[field.platform])
    if field.deprecated_names:
        sentences.append("Deprecated names: " + ", ".join(f"`{n}`" for n in field.deprecated_names) + ".")
    if field.pending:
        sentences.append(f"**Accepted, no effect yet** (waits for {field.pending}).")
    return " ".join(sentences)


def _row(name: str, description: str, default: str) -> str:
    shown = f"`{default}`" if default else "Not set"
    return f"| `{name}` | {description.replace('|', chr(92) + '|')} | {shown} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| Environment Variable | Description | Default Value |", "| --- | --- | --- |", *rows]) + "\n"


def _anchor(section: str) -> str:
    return "".join(c for c in section.lower() if c.isalnum() or c in " -").replace(" ", "-")
