"""The documentation page of the environment variables, from their declarations in ``srt/environ.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang.srt import environ_names as known
from sglang.srt.environ import declared_variables
from sglang.srt.environ_fields import EnvField


def render() -> str:
    """The whole page; what stands around the tables is environment_variables_page.txt."""
    fields = declared_variables()
    sections = []
    for section in dict.fromkeys(field.section for field in fields.values()):
        rows = [_row(name, _describe(f), f.default_text()) for name, f in fields.items() if f.section == section]
        sections.append(f"## {section}\n\n{_table(rows)}")
    amd = {name: f.section for name, f in fields.items() if f.platform == "hip"}
    refused = {name: _refusal_note(name, advice) for name, advice in known.NUMERICS.items()}
    page = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
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
    elif field.unit or field.minimum is not None:
        allowed = field.describe()
        sentences.append(allowed[0].upper() + allowed[1:] + ".")
    if field.requires:
        sentences.append(f"Requires {field.requires}.")
    if field.platform:
        sentences.append({"hip": "AMD ROCm only.", "cuda": "CUDA only.", "cpu": "CPU only."}[field.platform])
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
