#!/usr/bin/env python3
"""Draw functions of the product by a seed: does a name say in which file it stands?

    python scripts/draw_functions.py            # names alone: write down a file for each
    python scripts/draw_functions.py --files    # then look

docs/developer_guide/notes/names.md keeps a draw with the files that were predicted.
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

PRODUCT = Path(__file__).resolve().parent.parent / "python" / "sglang"
SEED, COUNT = 20261130, 10


def functions(tree: ast.AST, owner: str = "") -> Iterator[str]:
    """Functions of a module and methods of its classes as ``Class.method``; no special methods, nothing nested."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{owner}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("__"):
            yield owner + node.name


def homes(product: Path) -> dict[str, str]:
    """The file of each function whose name stands in one file alone, below ``product``; test code is left out."""
    found: dict[str, set[str]] = {}
    for path in sorted(product.rglob("*.py")):
        name = path.relative_to(product).as_posix()
        if not name.startswith("test/"):
            for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(function, set()).add(name)
    return {function: files.pop() for function, files in found.items() if len(files) == 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--files", action="store_true", help="print the files too")
    options = parser.parse_args()
    known = homes(PRODUCT)
    for function in random.Random(options.seed).sample(sorted(known), options.count):
        print(f"{function:<50} {known[function]}" if options.files else function)


if __name__ == "__main__":
    main()
