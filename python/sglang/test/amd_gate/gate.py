"""Compile every Triton kernel at its serving shapes for gfx942 and gfx950 and compare it with the checked-in table.

Shapes come from ``serving_cases/`` and from a walk: models run as they are served, on tensors without contents.
A row of the table contains the digest of its code; only code whose digest is not in the table is compiled.
A compile gate is not a correctness test, and nothing here has run on AMD hardware.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import triton

from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Op
from sglang.srt.platforms import override_platform
from sglang.test.amd_gate.driver import Launch, compile_only
from sglang.test.amd_gate.expectations import EXPECTED, MFMA_FP8, expected_instructions
from sglang.test.amd_gate.resources import Resources, drift, read_resources, unfit, violations
from sglang.test.amd_gate.serving_cases import activation, attention, gdn, mhc, moe, norm, quant, rope, sampling
from sglang.test.amd_gate.walk import OpCall, ShapeOnlyPlatform, Walk, WalkStep, describe_error, watched_ops
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.op_cases import Case

ARCHS = ("gfx942", "gfx950")
TABLE = Path(__file__).with_name("resources.json")
GROUPS = (activation, attention, gdn, mhc, moe, norm, quant, rope, sampling)
COLUMNS = (*(column.name for column in fields(Resources)), "digest")


@dataclass(frozen=True)
class Recorded:
    """A row of the table. ``digest`` is that of the code and of what was expected of it; "" if unknown."""

    resources: Resources
    digest: str = ""


Table = dict[str, dict[str, dict[str, Recorded]]]


@dataclass
class Row:
    """One kernel, as compiled for one shape: ``key`` is "kernel @ shape"; ``problems`` is empty when it passes.

    models: the walked models that launch this code. covered: a serving case launches it.
    """

    key: str
    arch: str
    resources: Resources
    problems: list[str]
    digest: str
    models: list[str] = field(default_factory=list)
    covered: bool = True

    def as_dict(self) -> dict[str, Any]:
        kernel, _, shape = self.key.partition(" @ ")
        named = {"kernel": kernel, "arch": self.arch, "triton": triton.__version__, "shape": shape}
        more = {"problems": self.problems, "models": self.models, "covered": self.covered}
        return {**named, **asdict(self.resources), **more}


@dataclass
class Findings:
    """The rows of one architecture, and faults without a row, with the places where each occurs.

    torch_only: ops that have only a torch reference, and where each was called first.
    """

    arch: str
    rows: list[Row] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    torch_only: dict[str, str] = field(default_factory=dict)

    def add_fault(self, text: str, place: str) -> None:
        self.faults.setdefault(text, []).append(place)

    @property
    def problems(self) -> list[str]:
        """One line per fault, those of rows included."""
        lines = [f"{self.arch} {row.key}: {problem}" for row in self.rows for problem in row.problems]
        for text, places in self.faults.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"{self.arch} {places[0]}{more}: {text}")
        return lines


def load_table(path: Path = TABLE) -> Table:
    """triton version -> arch -> "kernel @ shape" -> Recorded."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if tuple(data["columns"]) != COLUMNS:
        raise ValueError(f"{path}: columns are {data['columns']}, expected {list(COLUMNS)}; write the table again")
    return {
        version: {
            arch: {key: Recorded(Resources(*row[:-1]), row[-1]) for key, row in rows.items()}
            for arch, rows in archs.items()
        }
        for version, archs in data["rows"].items()
    }


def save_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Replace the rows of this Triton version in the table, keeping other versions'."""
    table = load_table(path) if path.exists() else {}
    table[triton.__version__] = {arch: {} for arch in ARCHS}
    for row in rows:
        # A row with a problem has no digest, so that its code is compiled, and refused, at each run.
        table[triton.__version__][row.arch][row.key] = Recorded(row.resources, "" if row.problems else row.digest)
    shown = {
        version: {
            arch: {key: [*asdict(row.resources).values(), row.digest] for key, row in found.items()}
            for arch, found in sorted(archs.items())
        }
        for version, archs in sorted(table.items())
    }
    text = json.dumps({"columns": COLUMNS, "rows": shown}, indent=1)
    one_row_a_line = re.sub(r"\[[^]]*\]", lambda row: json.dumps(json.loads(row[0])), text)
    path.write_text(one_row_a_line + "\n", encoding="utf-8")


def serving_cases() -> Iterator[tuple[Op, Case]]:
    """What the files of ``serving_cases/`` declare."""
    for group in GROUPS:
        for cases in group.CASES:
            yield from cases()


class RowCollector:
    """The rows of one architecture, one for each distinct code; ``recorded`` is what the table has, None if nothing."""

    def __init__(self, arch: str, recorded: dict[str, Recorded] | None) -> None:
        self.rows: dict[str, Row] = {}
        self._arch = arch
        self._recorded = recorded
        self._keys = {row.digest: key for key, row in (recorded or {}).items() if row.digest}
        self._taken: set[str] = set()

    def known(self, kernel: str, digest: str) -> bool:
        """Whether the table has a row without problems for this code."""
        return _with_expectations(kernel, digest) in self._keys

    def add(self, launch: Launch, shape: str, model: str | None = None) -> None:
        digest = _with_expectations(launch.kernel, launch.digest)
        row = self.rows.get(digest)
        if row is None:
            row = self._from_table(digest) if digest in self._keys else self._compiled(launch, shape, digest)
            row.covered = model is None
            self.rows[digest] = row
            self._taken.add(row.key)
        if model is not None and model not in row.models:
            row.models.append(model)

    def _from_table(self, digest: str) -> Row:
        assert self._recorded is not None
        key = self._keys[digest]
        needs = self._recorded[key].resources
        return Row(key, self._arch, needs, unfit(needs, self._arch), digest)

    def _compiled(self, launch: Launch, shape: str, digest: str) -> Row:
        needs = read_resources(launch, self._arch)
        problems = violations(launch, self._arch, expected_instructions(launch.kernel, shape))
        # Launches of one kernel by one case differ in specialisation; the grid distinguishes most of them.
        grid = "x".join(str(n) for n in launch.grid if n > 1) or "1"
        first = key = f"{launch.kernel} @ {shape} grid {grid}"
        count = 1
        while key in self._taken:
            count += 1
            key = f"{first} #{count}"
        if self._recorded is not None:
            before = self._recorded.get(key)
            new = ["is not in the table (--amd-update records it)"]
            problems += new if before is None else drift(needs, before.resources)
        return Row(key, self._arch, needs, problems, digest)


def _with_expectations(kernel: str, digest: str) -> str:
    return hashlib.sha256(f"{digest} {EXPECTED.get(kernel)} {MFMA_FP8}".encode()).hexdigest()[:16]


def check(
    arch: str, cases: Iterable[tuple[Op, Case]] | None = None, table: Table | None = None, walk: Walk | None = None
) -> Findings:
    """One row for each distinct compiled kernel of the cases (default: all) and of the walk (default: none)."""
    table = load_table() if table is None else table
    found = RowCollector(arch, table.get(triton.__version__, {}).get(arch))
    findings = Findings(arch)
    with override_platform(ShapeOnlyPlatform(arch)), fresh_decisions():
        REGISTRY.freeze()
        for op, case in serving_cases() if cases is None else cases:
            try:
                launches = _launches_of_case(op, case, arch, found)
            except Exception as error:  # one that does not compile must not hide the others
                findings.add_fault(describe_error(error), f"{op.name} {case.name}")
                continue
            for launch in launches:
                found.add(launch, f"{op.name} {case.name}")
        if walk is not None:
            with compile_only(arch, found.known) as driver, watched_ops(driver) as calls:
                for step in walk():
                    _take_step(step, calls, found, findings)
                    calls.clear()
    findings.rows = list(found.rows.values())
    return findings


def _launches_of_case(op: Op, case: Case, arch: str, found: RowCollector) -> list[Launch]:
    """The launches that dispatch makes for ``case``; raises when it would not choose Triton or does not compile."""
    fits = (impl for impl in op.table or () if impl.accepts is None or impl.accepts(*case.args))
    chosen = next(fits)
    if not chosen.name.startswith("triton"):
        raise ValueError(f"{op.name} {case.name}: dispatch on {arch} chooses {chosen.name!r}, not Triton")
    with compile_only(arch, found.known) as driver:
        chosen.fn(*case.args)
    return driver.launches


def _take_step(step: WalkStep, calls: list[OpCall], found: RowCollector, findings: Findings) -> None:
    where = f"{step.model} {step.step}"
    if step.error:
        findings.add_fault(step.error, where)
    for call in calls:
        for launch in call.launches:
            found.add(launch, f"{call.op} {step.model} {call.shape}", step.model)
        if call.reference and call.alone:
            findings.torch_only.setdefault(call.op, where)
        elif call.reference:
            findings.add_fault(f"{call.op} falls back to its torch reference", f"{where} ({call.shape})")


def check_all(table: Table | None = None, walk: Walk | None = None) -> list[Findings]:
    """``check`` of every serving case and of the walk, in one process per architecture."""
    count = len(ARCHS)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(check, ARCHS, [None] * count, [table] * count, [walk] * count))


def uncovered_ops() -> list[str]:
    """Ops with a Triton implementation that no serving case compiles."""
    covered = {op.name for op, _ in serving_cases()}
    with_triton = {op.name for op in REGISTRY.ops.values() if any(impl.name == "triton" for impl in op.impls)}
    return sorted(with_triton - covered)


def report(as_json: bool, update: bool, walk: Walk | None = None) -> int:
    """Print the rows and the problems; exit status 1 if there are problems."""
    uncovered = uncovered_ops()
    findings = check_all({} if update else None, walk)
    rows = [row for found in findings for row in found.rows]
    if update:
        save_table(rows)
    problems = [problem for found in findings for problem in found.problems]
    problems += [
        f"{name}: has a Triton implementation and no case in sglang/test/amd_gate/serving_cases" for name in uncovered
    ]
    if as_json:
        for row in rows:
            print(json.dumps(row.as_dict()))
    else:
        _print_text(rows, findings)
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr if as_json else sys.stdout)
    return int(bool(problems))


def _print_text(rows: list[Row], findings: list[Findings]) -> None:
    print(f"{'kernel @ shape':<84} {'arch':<7}" + "".join(f"{column:>10}" for column in COLUMNS[:-1]) + "  met by")
    for row in rows:
        values = "".join(f"{value:>10}" for value in asdict(row.resources).values())
        met_by = [*row.models, *([] if row.covered else ["(walk alone)"])]
        print(f"{row.key:<84} {row.arch:<7}{values}  {' '.join(met_by) or '-'}")
    for found in findings:
        alone = sum(not row.covered for row in found.rows)
        met = sum(bool(row.models) for row in found.rows)
        print(f"{found.arch}: {len(found.rows)} kernels, {met} met by a model, {alone} of them by no serving case")
        for op, where in found.torch_only.items():
            print(f"NOTE {found.arch} {where}: {op} has no implementation but torch")
    versions = sorted(load_table())
    compared = "drift checked" if triton.__version__ in versions else "drift not checked: not a recorded version"
    print(f"triton {triton.__version__} ({compared}; recorded: {', '.join(versions) or 'none'})")
    print(f"{len(rows)} kernels, {sum(bool(row.problems) for row in rows)} fail; none has run on AMD hardware")
