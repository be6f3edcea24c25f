#!/usr/bin/env python3
"""Hold the vendor fakes and every vendor call of the product to what the vendors published, read with ``ast``.

    python scripts/check_vendor_contracts.py                # one line a drift, exit status 1 if there is any
    python scripts/check_vendor_contracts.py --refresh DIR  # read the contracts again from wheels and checkouts in DIR

DIR holds ``amd_aiter-*.whl`` and ``amd_mori-*.whl`` as ``pip download --no-deps`` leaves them, and for a source that
is a commit the repository, cloned under its name. A source that is not there keeps its entry. Nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FAKES = REPO / "python" / "sglang" / "test" / "fakes"
CONTRACTS = FAKES / "vendor_contracts.json"
PRODUCT = REPO / "python" / "sglang"
PACKAGES = ("aiter", "mori")
# A class stands for its fields, "Class.*" for its public methods, "enum Name" for members of a C++ enum.
WANTED = {
    "aiter": {
        "aiter/ops/sample.py": ("greedy_sample",),
        "aiter/fused_moe.py": ("fused_moe",),
        "aiter/ops/shuffle.py": ("shuffle_weight",),
        "aiter/utility/fp4_utils.py": ("e8m0_shuffle",),
        "csrc/include/aiter_enum.h": ("enum ActivationType", "enum QuantType"),
        "aiter/ops/mhc.py": ("mhc_fused_post_pre",),
        "aiter/ops/triton/fusions/mhc.py": ("mhc_post_pre",),
        "aiter/ops/triton/utils/mhc_config_utils.py": ("get_mhc_config",),
    },
    "mori": {
        "mori/ops/dispatch_combine.py": ("EpDispatchCombineConfig", "EpDispatchCombineOp.*"),
        "mori/shmem/api.py": (
            "shmem_torch_process_group_init",
            "shmem_finalize",
            "shmem_mype",
            "shmem_npes",
            "shmem_barrier_all",
            "shmem_num_qp_per_pe",
        ),
        "include/mori/ops/dispatch_combine/dispatch_combine.hpp": ("enum KernelType",),
    },
}
# Where headers stand inside the wheels.
WHEEL_PREFIXES = ("", "aiter_meta/", "mori/_jit-sources/", "mori/_jit_sources/")
ENUM_CLASSES = {"KernelType": "EpDispatchCombineKernelType"}
Signatures = dict[str, list[str]]


@dataclass
class Source:
    """One published state of a vendor package, and which of our duties it binds."""

    name: str
    package: str
    origin: dict[str, str]
    binds: tuple[str, ...]  # "fakes": the fakes have these signatures; "calls": our calls fit them
    lacks: tuple[str, ...] = ()  # files that came later: the op table refuses what they hold on a release this old
    files: dict[str, dict] = field(default_factory=dict)

    def signatures(self) -> Signatures:
        """Every function, class and enum of the source by name."""
        return {name: params for file in self.files.values() for name, params in file["names"].items()}


def parameters(args: ast.arguments) -> list[str]:
    """Each parameter as ``name`` or ``name=default``; ``*`` before those that are keyword-only; self left out."""
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    shown = [_shown(arg.arg, default) for arg, default in zip(plain, defaults)]
    if args.vararg is not None:
        shown.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        shown.append("*")
    shown += [_shown(arg.arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults)]
    shown += [f"**{args.kwarg.arg}"] if args.kwarg is not None else []
    return shown[1:] if shown[:1] == ["self"] else shown


def _shown(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def python_signatures(text: str, wanted: tuple[str, ...] | None = None) -> Signatures:
    """Functions, public methods and dataclass fields of a file; only the wanted ones, if given."""
    found: Signatures = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            fields = [b for b in node.body if isinstance(b, ast.AnnAssign) and isinstance(b.target, ast.Name)]
            if fields:  # otherwise its constructor is not known
                found[node.name] = [_shown(b.target.id, b.value) for b in fields if isinstance(b.target, ast.Name)]
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    found[f"{node.name}.{method.name}"] = parameters(method.args)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node.args)
    if wanted is None:
        return found
    return {name: params for name, params in found.items() if name in wanted or f"{name.split('.')[0]}.*" in wanted}


def enum_members(text: str, name: str) -> list[str]:
    """``Member=value`` of a C++ enum."""
    match = re.search(rf"enum\s+(?:class\s+)?{name}\b[^{{]*{{(.*?)}}", text, re.S)
    if match is None:
        raise ValueError(f"no enum {name}")
    members, value = [], 0
    for entry in filter(None, (part.strip() for part in re.sub(r"//[^\n]*", "", match[1]).split(","))):
        key, _, given = (part.strip() for part in entry.partition("="))
        value = int(given) if given else value
        members.append(f"{key}={value}")
        value += 1
    return members


def read_file(path: str, text: str, wanted: tuple[str, ...]) -> dict:
    """The entry of one vendor file; raises ValueError when something wanted is not in it."""
    names = python_signatures(text, wanted) if path.endswith(".py") else {}
    names |= {entry[5:]: enum_members(text, entry[5:]) for entry in wanted if entry.startswith("enum ")}
    lacking = [
        w for w in wanted if not w.startswith("enum ") and not any(n == w or n.startswith(w[:-1]) for n in names)
    ]
    if lacking:
        raise ValueError(f"{path} has no {', '.join(lacking)}")
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "names": dict(sorted(names.items()))}


def refresh(source: Source, folder: Path) -> bool:
    """Read the source's files again; False when ``folder`` does not hold it."""
    opener = _open_wheel(source, folder) if "wheel" in source.origin else _open_checkout(source, folder)
    if opener is None:
        return False
    files = {path: wanted for path, wanted in WANTED[source.package].items() if path not in source.lacks}
    source.files = {path: read_file(path, opener(path), wanted) for path, wanted in files.items()}
    return True


def _open_wheel(source: Source, folder: Path) -> Callable[[str], str] | None:
    wheel = folder / source.origin["wheel"]
    if not wheel.exists():
        return None
    source.origin["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    archive = zipfile.ZipFile(wheel)
    members = set(archive.namelist())

    def read(path: str) -> str:
        inside = [prefix + path for prefix in WHEEL_PREFIXES if prefix + path in members]
        # MORI 1.0.0 keeps its shmem functions in the package itself.
        inside += [alternative for alternative in [path.replace("/api.py", "/__init__.py")] if not inside]
        return archive.read(inside[0]).decode()

    return read


def _open_checkout(source: Source, folder: Path) -> Callable[[str], str] | None:
    checkout = folder / source.origin["repository"].rsplit("/", 1)[1]
    if not checkout.exists():
        return None

    def read(path: str) -> str:
        command = ["git", "-C", str(checkout), "show", f"{source.origin['commit']}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return read


def load(path: Path) -> list[Source]:
    entries = json.loads(path.read_text())["sources"]
    return [Source(**{**e, "binds": tuple(e["binds"]), "lacks": tuple(e.get("lacks", ()))}) for e in entries]


def save(sources: list[Source], path: Path) -> None:
    text = json.dumps({"sources": [vars(source) for source in sources]}, indent=1)
    # One line a signature, so that a change of one shows as one line.
    one_line = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text)
    path.write_text(one_line + "\n")


def check_fakes(source: Source, fakes: Path, held: set[str]) -> Iterator[str]:
    """Every wanted name exists in the fake with the vendor's parameters; its classes have no method of their own.

    ``held``: names that a source before it has bound; the fakes are of the first source that has a name.
    """
    files = sorted((fakes / source.package).rglob("*.py"))
    ours: dict[str, tuple[Path, list[str]]] = {
        name: (path, params) for path in files for name, params in python_signatures(path.read_text()).items()
    }
    members = {name: found for path in files for name, found in enum_classes(path.read_text()).items()}
    where = f"fake {source.package} against {source.name}"
    vendors = {name: params for name, params in source.signatures().items() if name not in held}
    held |= set(vendors)
    for name, params in vendors.items():
        enum = ENUM_CLASSES.get(name, name)
        if enum in members or name in ENUM_CLASSES:
            if members.get(enum) != params:
                yield f"{where}: enum {enum} is {members.get(enum)}, the vendor's {params}"
        elif name in ours and ours[name][1] != params:
            path, found = ours[name]
            yield f"{where}: {path.name}: {name}({', '.join(found)}), the vendor has ({', '.join(params)})"
        elif name not in ours and "." not in name:
            yield f"{where}: {name} is missing in the fake"
    classes = {name.split(".")[0] for name in vendors if "." in name}
    for name, (path, _) in ours.items():
        if "." in name and name.split(".")[0] in classes and name not in vendors:
            yield f"{where}: {path.name}: the vendor has no {name}"


def enum_classes(text: str) -> dict[str, list[str]]:
    """``Member=value`` of every Enum class of a file."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Enum" for base in node.bases):
            entries = [b for b in node.body if isinstance(b, ast.Assign)]
            found[node.name] = [f"{ast.unparse(b.targets[0])}={ast.unparse(b.value)}" for b in entries]
    return found


@dataclass(frozen=True)
class VendorCall:
    """A call in our tree of the vendor's ``name``."""

    package: str
    name: str
    where: str
    call: ast.Call


class CallFinder(ast.NodeVisitor):
    """Vendor names that a file imports, and where it calls them or methods of what it builds with them."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.names: dict[str, tuple[str, str]] = {}  # local name -> (package, vendor name)
        self.modules: dict[str, str] = {}  # local name of a module -> package
        self.instances: dict[str, tuple[str, str]] = {}  # unparsed receiver -> (package, class)
        self.factories: dict[str, tuple[str, str]] = {}  # function of the file -> what it builds and returns
        self.imported: list[tuple[str, str, int]] = []
        self.calls: list[VendorCall] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in PACKAGES:
                self.modules[alias.asname or alias.name.split(".")[0]] = alias.name.split(".")[0]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = (node.module or "").split(".")[0]
        if node.level or package not in PACKAGES:
            return
        for alias in node.names:
            local = alias.asname or alias.name
            if alias.name in ("ops", "shmem"):
                self.modules[local] = package
            else:
                self.names[local] = (package, alias.name)
                self.imported.append((package, alias.name, node.lineno))

    def visit_arg(self, node: ast.arg) -> None:
        self._remember(node.arg, node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._remember(ast.unparse(node.target), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        alias = self._vendor_name(node.value)
        built = self._built_by(node.value)
        for target in map(ast.unparse, node.targets):
            if alias is not None:
                self.names[target] = alias
            if built is not None:
                self.instances[target] = built
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.generic_visit(node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and inner.value is not None:
                built = self._built_by(inner.value)
                if built is not None:
                    self.factories[node.name] = built

    def visit_Call(self, node: ast.Call) -> None:
        known = self._vendor_name(node.func)
        if known is None and isinstance(node.func, ast.Attribute):
            built = self.instances.get(ast.unparse(node.func.value))
            known = (built[0], f"{built[1]}.{node.func.attr}") if built else None
        if known is not None:
            self.calls.append(VendorCall(*known, f"{self.shown}:{node.lineno}", node))
        self.generic_visit(node)

    def _built_by(self, value: ast.expr) -> tuple[str, str] | None:
        """The vendor class of which ``value`` is an instance, as far as the file tells."""
        if isinstance(value, ast.Call):
            return self._vendor_name(value.func) or self.factories.get(ast.unparse(value.func))
        return self.instances.get(ast.unparse(value))

    def _remember(self, name: str, annotation: ast.expr | None) -> None:
        text = ast.unparse(annotation) if annotation is not None else ""
        if "EpDispatchCombineOp" in text:
            self.instances[name] = ("mori", "EpDispatchCombineOp")

    def _vendor_name(self, node: ast.expr) -> tuple[str, str] | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(node, ast.Attribute) and isinstance(root, ast.Name) and root.id in self.modules:
            return self.modules[root.id], node.attr
        return None


def misfit(call: ast.Call, params: list[str]) -> str | None:
    """Why the call does not bind to the parameters; None when it does, or when stars hide what it passes."""
    names = [entry.split("=")[0] for entry in params]
    positional = names[: names.index("*")] if "*" in names else names
    known = [name for name in names if not name.startswith("*")]
    given = [keyword.arg for keyword in call.keywords]
    for name in given:
        if name is not None and name not in known:
            return f"there is no parameter {name!r}"
    if None in given or any(isinstance(arg, ast.Starred) for arg in call.args):
        return None
    if len(call.args) > len(positional):
        return f"{len(call.args)} positional arguments, {len(positional)} are taken"
    filled = {*positional[: len(call.args)], *(name for name in given if name is not None)}
    lacking = [entry for entry in params if "=" not in entry and not entry.startswith("*") and entry not in filled]
    return f"{', '.join(lacking)} is not given" if lacking else None


def find_calls(product: Path) -> Iterator[CallFinder]:
    """What each file of the product, tests left out, imports and calls of the vendors."""
    for path in sorted(product.rglob("*.py")):
        if path.relative_to(product).parts[0] != "test":
            finder = CallFinder(str(path.relative_to(product.parent)))
            finder.visit(ast.parse(path.read_text(), filename=str(path)))
            yield finder


def check_calls(source: Source, finders: list[CallFinder]) -> Iterator[str]:
    """Every import and call of the source's package is in its contract and fits it."""
    known = source.signatures()
    names = {ENUM_CLASSES.get(name, name).split(".")[0] for name in known}
    later = {name for path in source.lacks for name in WANTED[source.package][path]}
    for finder in finders:
        for package, name, line in finder.imported:
            if package == source.package and name not in names | later:
                yield f"{finder.shown}:{line}: {name} is not in the contract of {source.name}: add it to WANTED"
        for call in finder.calls:
            if call.package != source.package or call.name in later:
                continue
            problem = misfit(call.call, known[call.name]) if call.name in known else None
            if call.name not in known and call.name not in names:
                problem = "there is no such function"
            if problem is not None:
                yield f"{call.where}: {call.name} of {source.name}: {problem}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", type=Path, metavar="DIR", help="folder of wheels and checkouts")
    parser.add_argument("--contracts", type=Path, default=CONTRACTS)
    parser.add_argument("--fakes", type=Path, default=FAKES)
    parser.add_argument("--product", type=Path, default=PRODUCT)
    args = parser.parse_args()
    sources = load(args.contracts)
    if args.refresh is not None:
        for source in sources:
            print(f"{source.name}: {'read' if refresh(source, args.refresh) else 'not found there, kept'}")
        save(sources, args.contracts)
    held: dict[str, set[str]] = {package: set() for package in PACKAGES}
    bound = [source for source in sources if "fakes" in source.binds]
    problems = [line for source in bound for line in check_fakes(source, args.fakes, held[source.package])]
    finders = list(find_calls(args.product))
    problems += [line for source in sources if "calls" in source.binds for line in check_calls(source, finders)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    count = sum(len(source.signatures()) for source in sources)
    calls = sum(len(finder.calls) for finder in finders)
    print(f"vendor contracts: {count} signatures of {len(sources)} sources, {calls} calls, {len(problems)} drifts")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
