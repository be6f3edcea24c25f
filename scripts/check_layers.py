#!/usr/bin/env python3
"""Check that imports under python/sglang point down only and make no circle of files, read with ``ast``.

Imports inside functions and for type checkers alone count.

    python scripts/check_layers.py            # prints one line a violation, exit status 1 if there is any

The tables below are the rule: a module imports from layers above its row or from its own package; packages of one
layer do not import each other; vendor packages and platform questions have few homes.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# (layer, module prefixes). Each prefix is one package; a prefix also covers `<prefix>_*` modules next to it.
LAYERS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ("sglang.version", "sglang.srt.environ")),
    (1, ("sglang.srt.platforms",)),
    (2, ("sglang.srt.utils", "sglang.srt.parser")),
    (
        3,
        (
            "sglang.srt.constrained",
            "sglang.kernels",
            "sglang.srt.configs",
            "sglang.srt.arg_groups",
            "sglang.srt.server_args",
        ),
    ),
    (4, ("sglang.srt.distributed",)),
    (5, ("sglang.srt.mem_cache", "sglang.srt.sampling")),
    (6, ("sglang.srt.layers",)),
    (7, ("sglang.srt.models",)),
    (8, ("sglang.srt.model_loader",)),
    (9, ("sglang.srt.model_executor",)),
    (10, ("sglang.srt.speculative",)),
    (11, ("sglang.srt.managers",)),
    (
        12,
        (
            "sglang.srt.entrypoints",
            # The door to a launch counts the memory of the model, so it stands above the rest of its package.
            "sglang.srt.arg_groups.plan",
            "sglang.cli",
            "sglang.launch_server",
            "sglang.bench",
            "sglang.check_env",
            "sglang.plan",
            "sglang.kernels.__main__",
        ),
    ),
)
# Layer 12 is the outermost: its commands share the entrypoints.
SIDEWAYS = {
    ("sglang.srt.server_args", "sglang.srt.arg_groups"),
    ("sglang.srt.arg_groups", "sglang.srt.server_args"),
    ("sglang.srt.arg_groups", "sglang.srt.configs"),
    ("sglang.srt.entrypoints", "sglang.srt.arg_groups.plan"),
    ("sglang.cli", "sglang.srt.entrypoints"),
    ("sglang.cli", "sglang.launch_server"),
    ("sglang.cli", "sglang.bench"),
    ("sglang.cli", "sglang.check_env"),
    ("sglang.launch_server", "sglang.srt.entrypoints"),
    ("sglang.launch_server", "sglang.srt.arg_groups.plan"),
    ("sglang.bench", "sglang.srt.entrypoints"),
    ("sglang.bench", "sglang.srt.arg_groups.plan"),
    ("sglang.plan", "sglang.srt.arg_groups.plan"),
}
# Data modules that any layer may import; they import torch, wire types and layers 0-2 alone. The list is closed.
LEAVES = (
    "sglang.srt.managers.io_struct",
    "sglang.srt.model_executor.forward_batch_info",
    "sglang.srt.sampling.sampling_params",
    "sglang.srt.speculative.spec_info",
)
LEAF_EXTERNALS = {"torch", "msgspec", "numpy"}
# Importable from every layer; imports the standard library alone.
DATA_PACKAGE = "sglang.embedded_models"
# Of these packages, the importer may use only the modules named.
ONLY: dict[tuple[str, str], tuple[str, ...]] = {
    ("sglang.srt.model_executor", "sglang.srt.models"): ("sglang.srt.models.registry",),
}
# Commands that use test code where a checkout has it, and say so where it is not installed.
CHECKOUT_COMMANDS = {"sglang.kernels.__main__": "sglang.test.amd_gate"}
# Namespace files: they belong to every layer, so they import nothing (the public one loads its names on demand).
BARE = ("sglang.srt",)

# Files that upstream's layout fixes and that may name a vendor or ask for the platform.
PINNED = (
    "sglang.srt.models.deepseek_v2",
    "sglang.srt.models.deepseek_v4",
    "sglang.srt.models.deepseek_v4_nextn",
    "sglang.srt.models.deepseek_nextn",
    "sglang.srt.models.qwen3_5",
    "sglang.srt.models.qwen3_5_mtp",
    "sglang.srt.models.qwen2_moe",
    "sglang.srt.models.deepseek_common.amd.deepseek_v4_fused_mhc",
    "sglang.srt.layers.moe.token_dispatcher.moriep",
    "sglang.srt.layers.moe.ep_moe.layer",
    "sglang.srt.layers.attention.deepseek_v4_backend_hip_radix",
    "sglang.srt.layers.attention.nsa.triton_decode.triton_mla_kernels_decode_optimized",
    "sglang.srt.layers.sampler",
    "sglang.srt.speculative.draft_utils",
)
# External module -> prefixes that may import it ("*pinned*" stands for PINNED; nothing means nobody in the product).
EXTERNAL_HOMES: dict[str, tuple[str, ...]] = {
    "triton": ("sglang.kernels", "*pinned*"),
    "aiter": ("sglang.kernels", "*pinned*"),
    "mori": ("sglang.kernels", "*pinned*"),
    "torch.distributed": ("sglang.srt.distributed", "*pinned*"),
    "starlette": ("sglang.srt.entrypoints",),
    "uvicorn": ("sglang.srt.entrypoints", "sglang.launch_server"),
    "transformers": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "shelve": (),
}
PLATFORM_QUESTIONS = {"is_hip", "is_cuda", "is_rocm", "is_cuda_alike", "torch.version.hip", "torch.version.cuda"}
PLATFORM_HOMES = ("sglang.srt.platforms", "sglang.kernels", "sglang.srt.utils.common", "*pinned*")


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def under(module: str, prefix: str) -> bool:
    """True for the prefix itself, for what is below it, and for ``<prefix>_*`` next to it."""
    return module == prefix or module.startswith((prefix + ".", prefix + "_"))


def locate(module: str) -> tuple[int, str] | None:
    """(layer, package prefix) of a module of the product; None when the table has no row for it."""
    if module == "sglang":
        return 12, "sglang"
    rows = [(layer, prefix) for layer, prefixes in LAYERS for prefix in prefixes if under(module, prefix)]
    return max(rows, key=lambda row: len(row[1]), default=None)


def at_home(module: str, homes: tuple[str, ...]) -> bool:
    return any(module in PINNED if home == "*pinned*" else under(module, home) for home in homes)


def imported_modules(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, wherever it stands.

    ``from a import b`` counts as ``a.b`` where that is a module of the tree; ``import_module("a.b")`` counts too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # torch.distributed has rules of its own and is not a file of this tree.
                yield node.lineno, full if full in known or full in EXTERNAL_HOMES else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def check_internal(module: str, target: str) -> str | None:
    """Why ``module`` may not import ``target``, both of the product; None when it may."""
    if under(target, "sglang.test"):
        if under(target, CHECKOUT_COMMANDS.get(module, target + ".")):
            return None
        return f"the product imports {target}; test code depends on the product, never the other way round"
    if under(target, DATA_PACKAGE) or target in LEAVES or target in BARE:
        return None
    here, there = locate(module), locate(target)
    if there is None:
        return f"{target} has no layer; add it to LAYERS in scripts/check_layers.py"
    if module in LEAVES:
        return None if there[0] <= 2 else f"leaf module imports {target} (layer {there[0]}); leaves use layers 0-2"
    assert here is not None, module
    if there[1] == here[1]:
        return None
    if there[0] > here[0]:
        return f"{here[1]} (layer {here[0]}) imports upwards: {target} (layer {there[0]})"
    if there[0] == here[0] and here[1] != "sglang" and (here[1], there[1]) not in SIDEWAYS:
        return f"{here[1]} imports sideways: {target} is of the same layer {here[0]}"
    allowed = ONLY.get((here[1], there[1]))
    if allowed is not None and target not in allowed:
        return f"{here[1]} may import of {there[1]} only {', '.join(allowed)}; found {target}"
    return None


def check_external(module: str, target: str) -> str | None:
    """Why ``module`` may not import the package ``target`` from outside the tree; None when it may."""
    for name, homes in EXTERNAL_HOMES.items():
        if (target == name or target.startswith(name + ".")) and not at_home(module, homes):
            where = ", ".join(homes).replace("*pinned*", "the pinned files") or "nowhere in the product"
            return f"imports {target}; its home is {where}"
    root = target.split(".")[0]
    stdlib = root in sys.stdlib_module_names
    place = locate(module)
    if not stdlib and ((place is not None and place[0] == 0) or under(module, DATA_PACKAGE)):
        return f"imports {target}; this module uses the standard library alone"
    if not stdlib and module in LEAVES and root not in LEAF_EXTERNALS:
        return f"leaf module imports {target}; leaves use {', '.join(sorted(LEAF_EXTERNALS))} alone"
    return None


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first repeated at the end; empty when there is no ring."""
    done: set[str] = set()
    for start in sorted(imports):
        way, branches = [start], [iter(sorted(imports[start]))]
        while way:
            target = next(branches[-1], None)
            if target is None:
                done.add(way.pop())
                branches.pop()
            elif target in way:
                return [*way[way.index(target) :], target]
            elif target in imports and target not in done:
                way.append(target)
                branches.append(iter(sorted(imports[target])))
    return []


def check_circles(imports: dict[str, set[str]], shown: dict[str, str]) -> list[Violation]:
    """One violation per ring of files; an import of each ring is taken out to find the next."""
    found = []
    left = {module: targets - {module} for module, targets in imports.items()}
    while ring := find_circle(left):
        found.append(Violation(shown[ring[0]], 1, f"files import each other: {' -> '.join(ring)}"))
        left[ring[-2]].discard(ring[-1])
    return found


def check_file(
    tree: ast.Module, is_package: bool, shown: str, module: str, imports: list[tuple[int, str]]
) -> list[Violation]:
    """All violations of one product file; ``module`` is its dotted name, ``imports`` are (line, module)."""
    found: list[Violation] = []
    if locate(module) is None and module not in BARE and not under(module, DATA_PACKAGE):
        found.append(Violation(shown, 1, f"{module} has no layer; add it to LAYERS in scripts/check_layers.py"))
        return found
    holds_leaf = is_package and any(leaf.rpartition(".")[0] == module for leaf in LEAVES)
    for line, target in imports:
        inside = target == "sglang" or target.startswith("sglang.")
        if module in BARE or (holds_leaf and inside):
            message: str | None = f"{module}/__init__.py imports {target}; every module below it would pull that in"
        elif under(module, DATA_PACKAGE) and inside:
            message = None if under(target, DATA_PACKAGE) else f"{DATA_PACKAGE} imports {target}; it is data alone"
        else:
            message = check_internal(module, target) if inside else check_external(module, target)
        if message is not None:
            found.append(Violation(shown, line, message))
    found.extend(Violation(shown, line, message) for line, message in platform_questions(tree, module))
    return found


def platform_questions(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, message) where a file outside the platform homes asks which vendor's device this is."""
    if at_home(module, PLATFORM_HOMES):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            asked = node.id
        # Tensor.is_cuda is an attribute of that name, and asks the same thing.
        elif isinstance(node, ast.Attribute):
            asked = ast.unparse(node) if ast.unparse(node.value) == "torch.version" else node.attr
        else:
            continue
        if asked in PLATFORM_QUESTIONS:
            yield node.lineno, f"asks {asked}; ask current_platform instead, or move it to platforms/ or kernels/"


def check_tree(root: Path) -> tuple[list[Violation], int]:
    """(violations, number of files read) under ``root``, the folder that holds ``sglang``."""
    files = {}
    for path in sorted((root / "sglang").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    known = set(files)
    violations: list[Violation] = []
    product = {module: path for module, path in files.items() if not under(module, "sglang.test")}
    graph: dict[str, set[str]] = {}
    shown = {module: str(path.relative_to(root)) for module, path in files.items()}
    for module, path in files.items():
        tree, is_package = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), path.name == "__init__.py"
        imports = list(imported_modules(tree, module, is_package, known))
        graph[module] = {target for _, target in imports}
        if module in product:
            violations += check_file(tree, is_package, shown[module], module, imports)
    return violations + check_circles(graph, shown), len(product)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=REPO / "python", help="folder that holds sglang/")
    root = parser.parse_args().root
    violations, count = check_tree(root)
    if count == 0:
        print(f"error: no Python file under {root / 'sglang'}", file=sys.stderr)
        return 2
    for violation in violations:
        print(violation)
    print(f"check_layers: {count} files, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
