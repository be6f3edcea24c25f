#!/usr/bin/env python3
"""Print lines by package and the longest files and functions; exit status 1 when a budget or a limit is passed.

python scripts/size.py
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
AIM_FUNCTION_LINES = 60
# Most lines of each package of the product. A change that needs more raises the number here, and says why.
BUDGETS = {
    "sglang/*.py": 850,
    "sglang/bench_utils": 1_190,
    "sglang/cli": 90,
    "sglang/embedded_models": 20,
    "sglang/kernels": 11_020,  # decode attention gates its output
    "sglang/srt/*.py": 1_000,
    "sglang/srt/arg_groups": 2_415,  # the plan of streams follows from settings
    "sglang/srt/configs": 2_135,  # a folder of a model is looked at before torch is loaded
    "sglang/srt/constrained": 400,
    "sglang/srt/distributed": 285,
    "sglang/srt/entrypoints": 4_400,  # errors name the fields that a client sent
    "sglang/srt/layers": 5_030,  # a norm gives one row multiplied; attention takes its gate
    "sglang/srt/managers": 5_275,  # prefill steps are launched one ahead of results; warnings of requests, grammars
    "sglang/srt/mem_cache": 1_855,
    "sglang/srt/model_executor": 2_480,  # prompt steps are captured and checked; warm-up samples as requests do
    "sglang/srt/model_loader": 330,
    "sglang/srt/models": 2_160,  # models name the product that their norms precede
    "sglang/srt/parser": 710,  # types of arguments follow the references of their schemas
    "sglang/srt/platforms": 640,
    "sglang/srt/sampling": 740,  # a host keeps a list of what it edits in place, a device marks of all ids
    "sglang/srt/speculative": 1_040,  # draws and counts of a verify step are captured too
    "sglang/srt/utils": 2_125,
}
FOLDERS = ("python", "scripts", "test", "benchmark", "examples")


@dataclass(frozen=True)
class Function:
    path: str
    line: int
    name: str
    lines: int
    is_kernel: bool


def functions(tree: ast.Module, path: str) -> Iterator[Function]:
    """Every function and method of a file, with its length in lines, decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            is_kernel = any(d.startswith("triton.") for d in decorators)
            yield Function(path, node.lineno, node.name, (node.end_lineno or 0) - node.lineno + 1, is_kernel)


def package_of(path: str) -> str:
    """The row of the listing that a file belongs to, e.g. ``sglang/srt/layers``."""
    parts = Path(path).parts
    if parts[0] != "python":
        return parts[0]
    depth = 3 if parts[2:3] == ("srt",) else 2
    return "/".join(parts[1 : 1 + depth]) if len(parts) > 1 + depth else "/".join(parts[1:-1]) + "/*.py"


def measure(root: Path) -> tuple[dict[str, int], list[Function]]:
    """(lines by file, functions) of all Python files below the tree's source folders."""
    lines: dict[str, int] = {}
    found: list[Function] = []
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        shown = path.relative_to(root).as_posix()
        lines[shown] = len(text.splitlines())
        found += functions(ast.parse(text, filename=str(path)), shown)
    return lines, found


def is_product(path: str) -> bool:
    return path.startswith("python/") and not path.startswith("python/sglang/test/")


def past_budget(lines: dict[str, int]) -> list[str]:
    """One message for each package of the product that has more lines than its budget, or no budget."""
    totals: Counter[str] = Counter()
    for path, count in lines.items():
        if is_product(path):
            totals[package_of(path)] += count
    return [
        f"{name}: {count:,} lines, its budget is {BUDGETS[name]:,}; shorten it, or raise the budget in scripts/size.py"
        if name in BUDGETS
        else f"{name}: no budget; add a row to BUDGETS in scripts/size.py"
        for name, count in sorted(totals.items())
        if count > BUDGETS.get(name, 0)
    ]


def past_limit(lines: dict[str, int], found: list[Function]) -> list[str]:
    """One message for each file or function past its limit."""
    return [
        f"{path}: {count} lines, the limit is {MAX_FILE_LINES}; split it by what it does"
        for path, count in lines.items()
        if count > MAX_FILE_LINES
    ] + [
        f"{f.path}:{f.line}: {f.name} has {f.lines} lines, the limit is {MAX_FUNCTION_LINES}; take parts out"
        for f in found
        if f.lines > MAX_FUNCTION_LINES and not f.is_kernel
    ]


def report(lines: dict[str, int], found: list[Function]) -> None:
    by_package: Counter[str] = Counter()
    for path, count in lines.items():
        by_package[package_of(path)] += count
    width = max((len(name) for name in by_package), default=0)
    for name, count in sorted(by_package.items()):
        print(f"{name:<{width}} {count:>7,}" + (f" of {BUDGETS[name]:>6,}" if name in BUDGETS else ""))
    product = sum(count for path, count in lines.items() if is_product(path))
    print(f"product lines: {product:,} of {sum(BUDGETS.values()):,}")
    print("longest files:", *(f"  {count:>4} {path}" for path, count in _top(lines.items(), 1)), sep="\n")
    rows = [((f.path, f.line, f.name, f.is_kernel), f.lines) for f in found]
    print("longest functions:")
    for (path, line, name, is_kernel), count in _top(rows, 1):
        print(f"  {count:>4} {path}:{line} {name}{' (kernel body)' if is_kernel else ''}")
    above = sum(f.lines > AIM_FUNCTION_LINES and not f.is_kernel for f in found)
    print(f"functions above the aim of {AIM_FUNCTION_LINES} lines: {above} of {len(found)}")


def _top(rows, key: int, count: int = 5) -> list:
    return sorted(rows, key=lambda row: (-row[key], row[0]))[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=REPO)
    lines, found = measure(parser.parse_args().root)
    if not lines:
        print("error: no Python file found", file=sys.stderr)
        return 2
    report(lines, found)
    problems = past_budget(lines) + past_limit(lines, found)
    for problem in problems:
        print(f"error: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
