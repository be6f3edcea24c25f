"""Compile every Triton kernel at its serving shapes for gfx942 and gfx950 and hold it against the checked-in table.

A compile gate is not a correctness test, and nothing here has run on AMD hardware. Triton caches compiled kernels by
a hash of their source, so only what changed is compiled again.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pkgutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import triton

from sglang.kernels.amd.driver import Launch, compile_only
from sglang.kernels.amd.expectations import expected_instructions
from sglang.kernels.amd.resources import Resources, drift, read_resources, violations
from sglang.kernels.registry import REGISTRY, fresh_decisions
from sglang.kernels.spec import Case, Op
from sglang.srt.platforms import Platform, override_platform

ARCHS = ("gfx942", "gfx950")
TABLE = Path(__file__).with_name("resources.json")
COLUMNS = tuple(column.name for column in fields(Resources))


class ShapeOnlyPlatform(Platform):
    """A HIP platform of ``arch`` whose tensors have no storage: dispatch chooses as on the machine."""

    kind = "hip"
    device_type = "cuda"

    def __init__(self, arch: str) -> None:
        self._arch = arch

    @property
    def arch(self) -> str:
        return self._arch

    def describe(self) -> str:
        return f"{self._arch}, shapes only"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        return 0, 0

    def set_device(self, local_rank: int) -> None:
        return None

    def synchronize(self) -> None:
        return None


@dataclass(frozen=True)
class Row:
    """One kernel, as compiled for one shape; ``problems`` is empty when it passes."""

    kernel: str
    arch: str
    triton: str
    shape: str
    resources: Resources
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        named = {"kernel": self.kernel, "arch": self.arch, "triton": self.triton, "shape": self.shape}
        return {**named, **asdict(self.resources), "problems": list(self.problems)}

    @property
    def key(self) -> str:
        return f"{self.kernel} @ {self.shape}"


Table = dict[str, dict[str, dict[str, Resources]]]


def load_table(path: Path = TABLE) -> Table:
    """triton version -> arch -> "kernel @ shape" -> Resources."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if tuple(data["columns"]) != COLUMNS:
        raise ValueError(f"{path}: columns are {data['columns']}, expected {list(COLUMNS)}; write the table anew")
    return {
        version: {arch: {key: Resources(*row) for key, row in rows.items()} for arch, rows in archs.items()}
        for version, archs in data["rows"].items()
    }


def save_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Replace the rows of this Triton version in the table, keeping other versions'."""
    table = load_table(path) if path.exists() else {}
    table[triton.__version__] = {arch: {} for arch in ARCHS}
    for row in rows:
        table[row.triton][row.arch][row.key] = row.resources
    lines = ["{", f' "columns": {json.dumps(COLUMNS)},', ' "rows": {']
    for version, archs in sorted(table.items()):
        lines.append(f"  {json.dumps(version)}: {{")
        for arch, found in sorted(archs.items()):
            lines.append(f"   {json.dumps(arch)}: {{")
            lines += [f"    {json.dumps(key)}: {json.dumps(list(asdict(r).values()))}," for key, r in found.items()]
            lines[-1] = lines[-1].rstrip(",")
            lines.append("   },")
        lines[-1] = "   }"
        lines.append("  },")
    lines[-1] = "  }"
    path.write_text("\n".join([*lines, " }", "}"]) + "\n", encoding="utf-8")


def serving_cases() -> Iterator[tuple[Op, Case]]:
    """What the modules of ``sglang.kernels.ops`` declare in ``serving_cases()``: arguments without storage."""
    package = importlib.import_module("sglang.kernels.ops")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("_triton"):
            declared = getattr(importlib.import_module(module.name), "serving_cases", None)
            yield from declared() if declared is not None else ()


def compile_case(op: Op, case: Case, arch: str) -> list[Launch]:
    """The launches that dispatch makes for ``case``; raises when it would not choose Triton or does not compile."""
    fits = (impl for impl in op.table or () if impl.accepts is None or impl.accepts(*case.args, **case.kwargs))
    chosen = next(fits)
    if chosen.name != "triton":
        raise ValueError(f"{op.name} {case.name}: dispatch on {arch} chooses {chosen.name!r}, not 'triton'")
    with compile_only(arch) as driver:
        chosen.fn(*case.args, **case.kwargs)
    return driver.launches


def check(arch: str, cases: Iterable[tuple[Op, Case]] | None = None, table: Table | None = None) -> list[Row]:
    """One row for each distinct compiled kernel of the cases (default: all) on ``arch``."""
    table = (load_table() if TABLE.exists() else {}) if table is None else table
    recorded = table.get(triton.__version__, {}).get(arch)
    rows: dict[str, Row] = {}
    with override_platform(ShapeOnlyPlatform(arch)), fresh_decisions():
        REGISTRY.freeze()
        for op, case in serving_cases() if cases is None else cases:
            for launch in compile_case(op, case, arch):
                if launch.metadata["hash"] not in rows:
                    rows[launch.metadata["hash"]] = _row(launch, f"{op.name} {case.name}", arch, recorded)
    return list(rows.values())


def check_all(table: Table | None = None) -> list[Row]:
    """``check`` of every serving case, the architectures side by side in processes of their own."""
    with ProcessPoolExecutor(len(ARCHS), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(check, ARCHS, [None] * len(ARCHS), [table] * len(ARCHS))
        return [row for rows in found for row in rows]


def _row(launch: Launch, shape: str, arch: str, recorded: dict[str, Resources] | None) -> Row:
    needs = read_resources(launch, arch)
    problems = violations(launch, arch, expected_instructions(launch.kernel, shape))
    # A kernel that one case launches twice differs in what it is specialised on; its grid tells the two apart.
    grid = "x".join(str(n) for n in launch.grid if n > 1) or "1"
    row = Row(launch.kernel, arch, triton.__version__, f"{shape} grid {grid}", needs, tuple(problems))
    if recorded is None:
        return row
    before = recorded.get(row.key)
    drifted = ["is not in the table (--amd-update records it)"] if before is None else drift(needs, before)
    return replace(row, problems=(*problems, *drifted))


def uncovered_ops() -> list[str]:
    """Ops with a Triton implementation that no serving case compiles."""
    REGISTRY.load_all()
    covered = {op.name for op, _ in serving_cases()}
    with_triton = (op.name for op in REGISTRY.ops.values() if any(impl.name == "triton" for impl in op.impls))
    return sorted(name for name in with_triton if name not in covered)


def report(as_json: bool, update: bool) -> int:
    """Print the rows and what is wrong; exit status 1 when anything is."""
    uncovered = uncovered_ops()
    rows = check_all({} if update else None)
    if update:
        save_table(rows)
    if as_json:
        for row in rows:
            print(json.dumps(row.as_dict()))
    else:
        _print_text(rows)
        for name in uncovered:
            print(f"FAIL {name}: has a Triton implementation and no serving_cases() in its file")
    return int(bool(uncovered) or any(row.problems for row in rows))


def _print_text(rows: list[Row]) -> None:
    print(f"{'kernel @ shape':<84} {'arch':<7}" + "".join(f"{column:>10}" for column in COLUMNS))
    for row in rows:
        print(f"{row.key:<84} {row.arch:<7}" + "".join(f"{value:>10}" for value in asdict(row.resources).values()))
    for row in rows:
        for problem in row.problems:
            print(f"FAIL {row.arch} {row.key}: {problem}")
    versions = sorted(load_table()) if TABLE.exists() else []
    compared = "drift checked" if triton.__version__ in versions else "drift not checked: not a recorded version"
    print(f"triton {triton.__version__} ({compared}; recorded: {', '.join(versions) or 'none'})")
    print(f"{len(rows)} kernels compiled, {sum(bool(row.problems) for row in rows)} fail; none has run on AMD hardware")
