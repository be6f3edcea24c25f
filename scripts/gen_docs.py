#!/usr/bin/env python3
"""Write the documentation pages that are generated from the code, or with --check say which are out of date."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python"
SHOWN_DIFF_LINES = 20


def render_environment_variables() -> str:
    """The page of environment variables."""
    return str(importlib.import_module("environment_variables_page").render())


def render_server_arguments() -> str:
    """The page of command-line flags."""
    return str(importlib.import_module("server_arguments_page").render())


def render_limits() -> str:
    """The page of fixed limits."""
    return str(importlib.import_module("limits_page").render())


def render_metrics() -> str:
    """The page of metrics."""
    return str(importlib.import_module("metrics_page").render())


PAGES: dict[str, Callable[[], str]] = {
    "docs/references/environment_variables.md": render_environment_variables,
    "docs/advanced_features/server_arguments.md": render_server_arguments,
    "docs/references/limits.md": render_limits,
    "docs/basic_usage/metrics.md": render_metrics,
}


def main() -> int:
    """Generate or check every page; returns 1 if --check finds one that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"default: {', '.join(PAGES)}")
    args = parser.parse_args()
    if unknown := [name for name in args.pages if name not in PAGES]:
        parser.error(f"no such page: {', '.join(unknown)}")
    sys.path.insert(0, str(PACKAGE))
    stale = 0
    for name in args.pages or PAGES:
        path = ROOT / name
        wanted = PAGES[name]()
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == wanted:
            print(f"{name}: up to date")
        elif args.check:
            stale += 1
            print_difference(name, present, wanted)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
            print(f"{name}: written")
    if stale:
        print(f"{stale} page(s) out of date; run python scripts/gen_docs.py")
    return 1 if stale else 0


def print_difference(name: str, present: str, wanted: str) -> None:
    """The first changed lines of a stale page."""
    if not present:
        print(f"{name}: missing")
        return
    diff = list(difflib.unified_diff(present.splitlines(), wanted.splitlines(), name, "generated", lineterm="", n=0))
    print(f"{name}: out of date")
    for line in diff[:SHOWN_DIFF_LINES]:
        print(f"  {line}")
    if len(diff) > SHOWN_DIFF_LINES:
        print(f"  ... {len(diff) - SHOWN_DIFF_LINES} more lines")


if __name__ == "__main__":
    sys.exit(main())
