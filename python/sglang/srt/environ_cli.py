"""The command line of `sglang.srt.environ`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.environ_check import check
from sglang.srt.environ_fields import EnvField

Fields = Mapping[str, EnvField[Any]]


def main(argv: Sequence[str] | None, fields: Fields) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang.srt.environ", description="Show or check the variables.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="names, types, defaults and values that are set")
    action.add_argument(
        "--check", action="store_true", help="check this environment; exit 2 if a server would refuse it"
    )
    parser.add_argument("--platform", choices=("cpu", "cuda", "hip"), help="with --check: platform kind to check for")
    args = parser.parse_args(argv)
    if args.check:
        return _print_check(fields, args.platform)
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
