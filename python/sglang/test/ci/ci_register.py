"""CI registration: a test file says on which hardware and in which suite it runs, and that line is read with ``ast``.

The ``register_*_ci`` functions do nothing when the file runs. ``collect_tests`` reads the calls without importing
the file, so their arguments must be literals and the call a bare statement at module level.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CPU_SUITES = (
    "stage-a-test-cpu",
    "stage-b-test-cpu",
)

CUDA_SUITES = (
    "stage-a-test-1-gpu-small",
    "stage-b-test-1-gpu-small",
    "stage-b-test-1-gpu-large",
    "stage-b-test-2-gpu-large",
    "stage-c-test-4-gpu-h100",
    "stage-c-test-8-gpu-h200",
)

AMD_SUITES = (
    "stage-a-test-1-gpu-small-amd",
    "stage-b-test-1-gpu-small-amd",
    "stage-b-test-1-gpu-small-amd-nondeterministic",
    "stage-b-test-1-gpu-small-amd-mi35x",
    "stage-b-test-1-gpu-large-amd",
    "stage-b-test-2-gpu-large-amd",
    "stage-b-test-large-8-gpu-mi35x-disaggregation-amd",
    "stage-c-test-4-gpu-amd",
    "stage-c-test-large-8-gpu-amd",
    "stage-c-test-large-8-gpu-amd-mi35x",
    "jit-kernel-unit-test-amd",
    "jit-kernel-benchmark-test-amd",
    "sgl-kernel-unit-test-2-gpu-amd",
    "extra-a-test-1-gpu-small-amd",
    "extra-a-test-1-gpu-large-amd",
    "extra-a-test-2-gpu-large-amd",
)

NIGHTLY_SUITES = {
    "cpu": ("nightly-cpu",),
    "cuda": ("nightly-1-gpu", "nightly-4-gpu", "nightly-8-gpu"),
    "amd": (
        "nightly-amd",
        "nightly-amd-1-gpu",
        "nightly-amd-4-gpu",
        "nightly-amd-8-gpu",
        "nightly-amd-1-gpu-mi35x",
        "nightly-amd-8-gpu-mi35x",
        "nightly-amd-kernel-1-gpu",
    ),
}

PER_COMMIT_SUITES = {"cpu": CPU_SUITES, "cuda": CUDA_SUITES, "amd": AMD_SUITES}

# Backends whose registrations are read and checked, but which this tree has no runner for.
FOREIGN_BACKENDS = ("npu", "xpu", "musa", "mlx")
BACKENDS = (*PER_COMMIT_SUITES, *FOREIGN_BACKENDS)


@dataclass(frozen=True)
class CIRegistration:
    """One ``register_<backend>_ci`` call of one test file; ``est_time`` in seconds."""

    backend: str
    filename: str
    est_time: float
    suite: str
    nightly: bool = False
    disabled: str | None = None


def register_cpu_ci(
    est_time: float,
    suite: str | None = None,
    nightly: bool = False,
    disabled: str | None = None,
    *,
    stage: str | None = None,
    runner_config: str | None = None,
) -> None:
    """Say that this file belongs to a CPU suite; est_time in seconds. Nothing happens at run time."""


# One signature for every backend: the reader below accepts the same arguments for all of them.
register_cuda_ci = register_amd_ci = register_cpu_ci
register_npu_ci = register_xpu_ci = register_musa_ci = register_mlx_ci = register_cpu_ci

_POSITIONAL = ("est_time", "suite", "nightly", "disabled")
_TYPES: dict[str, tuple[type, ...]] = {
    "est_time": (int, float),
    "suite": (str,),
    "nightly": (bool,),
    "disabled": (str, type(None)),
    "stage": (str,),
    "runner_config": (str,),
}
_FUNCTION_NAME = re.compile(r"register_\w+_ci")
_FUNCTIONS = {f"register_{backend}_ci": backend for backend in BACKENDS}


def valid_suites(backend: str, nightly: bool) -> tuple[str, ...]:
    """Names that a registration of this backend may use; empty for a backend without a runner here."""
    table = NIGHTLY_SUITES if nightly else PER_COMMIT_SUITES
    return table.get(backend, ())


def parse_registrations(path: str | Path, name: str | None = None) -> list[CIRegistration]:
    """Read the ``register_*_ci`` calls of one file without running it.

    ``name`` is the file name put into the result (default: the path). Raises ValueError, naming the file and line,
    when a call is not a bare module-level statement, an argument is not a literal, is unknown, given twice or of
    the wrong type, when suite and (stage, runner_config) are both or neither given, or a suite name is unknown.
    """
    path = Path(path)
    tree = _parse(path)
    statements = {id(node.value) for node in tree.body if isinstance(node, ast.Expr)}
    found: list[CIRegistration] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = _called_name(node)
        if not _FUNCTION_NAME.fullmatch(function):
            continue
        backend = _FUNCTIONS.get(function)
        if backend is None:
            raise ValueError(f"{path}:{node.lineno}: {function} is unknown; one of: {', '.join(_FUNCTIONS)}")
        where = f"{path}:{node.lineno}: register_{backend}_ci"
        if id(node) not in statements:
            raise ValueError(f"{where} must be a bare statement at module level; move it right after the imports")
        registration = _read_call(node, backend, name or str(path), where)
        if any((r.backend, r.suite, r.nightly) == (backend, registration.suite, registration.nightly) for r in found):
            raise ValueError(f"{where} registers suite {registration.suite!r} twice; keep one of the calls")
        found.append(registration)
    return found


def collect_tests(files: Iterable[str | Path], root: str | Path | None = None) -> list[CIRegistration]:
    """Read the registrations of all files; every file must register and must run its tests under ``__main__``.

    ``root`` makes file names in the result relative. Raises ValueError naming the first file that breaks a rule.
    """
    result: list[CIRegistration] = []
    for path in sorted(Path(f) for f in files):
        if path.name in ("__init__.py", "conftest.py"):
            continue
        name = str(path.relative_to(root)) if root is not None else str(path)
        registrations = parse_registrations(path, name)
        if not registrations:
            raise ValueError(
                f"{path}: no CI registration found; add e.g. "
                f'register_cpu_ci(est_time=5, suite="stage-a-test-cpu") right after the imports'
            )
        if not _has_main_call(_parse(path)):
            raise ValueError(
                f'{path}: no test would run; end the file with: if __name__ == "__main__": unittest.main()'
            )
        result.extend(registrations)
    return result


def auto_partition(files: Iterable[CIRegistration], rank: int, size: int) -> list[CIRegistration]:
    """Part ``rank`` of ``size``: longest first, each to the lightest bin, ties by file name; deterministic."""
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"partition id must be in [0, {size}) with size at least 1; got id {rank} of {size}")
    bins: list[list[CIRegistration]] = [[] for _ in range(size)]
    load = [0.0] * size
    for registration in sorted(files, key=lambda r: (-r.est_time, r.filename)):
        lightest = min(range(size), key=lambda i: (load[i], i))
        bins[lightest].append(registration)
        load[lightest] += registration.est_time
    return bins[rank]


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error


def _called_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _read_call(call: ast.Call, backend: str, filename: str, where: str) -> CIRegistration:
    values = _read_arguments(call, where)
    if "est_time" not in values:
        raise ValueError(f"{where}: est_time (seconds) is required")
    if values["est_time"] <= 0:
        raise ValueError(f"{where}: est_time must be a positive number of seconds, got {values['est_time']!r}")
    pair = [key for key in ("stage", "runner_config") if key in values]
    if ("suite" in values) == bool(pair) or len(pair) == 1:
        raise ValueError(f"{where}: give either suite= or both stage= and runner_config=, got {sorted(values)}")
    suite = values["suite"] if "suite" in values else f"{values['stage']}-test-{values['runner_config']}"
    nightly = values.get("nightly", False)
    allowed = valid_suites(backend, nightly)
    if backend not in FOREIGN_BACKENDS and suite not in allowed:
        kind = "nightly " if nightly else ""
        raise ValueError(f"{where}: unknown {kind}suite {suite!r}; one of: {', '.join(allowed)}")
    return CIRegistration(backend, filename, float(values["est_time"]), suite, nightly, values.get("disabled"))


def _read_arguments(call: ast.Call, where: str) -> dict:
    if any(isinstance(arg, ast.Starred) for arg in call.args) or any(kw.arg is None for kw in call.keywords):
        raise ValueError(f"{where}: * and ** arguments cannot be read from the source; write them out")
    if len(call.args) > len(_POSITIONAL):
        raise ValueError(f"{where}: at most {len(_POSITIONAL)} positional arguments, got {len(call.args)}")
    given = [*zip(_POSITIONAL, call.args), *((str(kw.arg), kw.value) for kw in call.keywords)]
    values: dict = {}
    for key, node in given:
        if key not in _TYPES:
            raise ValueError(f"{where}: unknown argument {key!r}; one of: {', '.join(_TYPES)}")
        if key in values:
            raise ValueError(f"{where}: argument {key!r} is given twice")
        if not isinstance(node, ast.Constant):
            raise ValueError(f"{where}: {key} must be a literal, got {ast.unparse(node)!r}")
        # bool is an int for isinstance; est_time=True is a mistake all the same.
        if type(node.value) not in _TYPES[key]:
            wanted = " or ".join(t.__name__ for t in _TYPES[key])
            raise ValueError(f"{where}: {key} must be {wanted}, got {node.value!r}")
        values[key] = node.value
    return values


def _has_main_call(tree: ast.Module) -> bool:
    for node in tree.body:
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Compare)
            and {ast.unparse(node.test.left), *map(ast.unparse, node.test.comparators)} == {"__name__", "'__main__'"}
            and any(isinstance(inner, ast.Call) for statement in node.body for inner in ast.walk(statement))
        ):
            return True
    return False
