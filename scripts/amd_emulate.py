#!/usr/bin/env python3
"""Run the machine code of the ops' Triton kernels for AMD on this CPU, over the ops' own cases, next to the references.

    python scripts/amd_emulate.py [op ...] [--tinygrad DIR] [--arch gfx950] [--case TEXT]

Each case runs as it is, and once more with its tensors in the types that the op is served in. Exit status 0: all ran
and agree. 1: a case disagrees. 3: something was not run. It needs a checkout of tinygrad (``--tinygrad`` or
SGLANG_EMULATOR_TINYGRAD), a C compiler, and what tinygrad compiles with: clang, and a libLLVM of 17 or later.
docs/developer_guide/benchmark_and_profiling.md says what it cannot see.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang.kernels.impl import Impl, OpSpec
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.platforms import override_platform
from sglang.test.amd_emulator.driver import emulated
from sglang.test.amd_emulator.emulator import EmulatorError, use_tinygrad
from sglang.test.amd_gate.gate import ARCHS
from sglang.test.amd_gate.walk import ShapeOnlyPlatform
from sglang.test.op_cases import Case, cases_of

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "test" / "registered" / "kernels"))
PASSED, DISAGREES, NOT_RUN = 0, 1, 3
# Any choice among equals is right, or a draw is judged: only the cases as they are have a judge.
AS_THEY_ARE = ("moe.topk", "sampling.")
# What differs, at most, of the largest value of a result in 16 bits; products of 8-bit rows have their own bound.
BOUND = 2e-2


@dataclass
class Report:
    """What became of an op's cases on one architecture."""

    cases: int = 0
    launches: int = 0
    instructions: int = 0
    disagree: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


def as_served(op: OpSpec, case: Case, served: dict[str, Case]) -> Case | None:
    """The case with its floating tensors in the types of the op's first serving case; None if they are so already."""
    if op.name not in served or op.name.startswith(AS_THEY_ARE):
        return None
    wanted = [arg.dtype if isinstance(arg, torch.Tensor) else None for arg in served[op.name].args]
    args = []
    for arg, dtype in zip(case.args, [*wanted, *[None] * len(case.args)]):
        moved = (
            isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
        )
        args.append(arg.to(dtype) if moved and isinstance(arg, torch.Tensor) else arg)
    if all(one is other for one, other in zip(args, case.args)):
        return None
    return Case(f"{case.name} as served", tuple(args))


def run_as_served(op: OpSpec, impl: Impl, case: Case) -> None:
    """AssertionError when a result, or an argument that is written, differs from the reference's by more than BOUND."""
    from test_op_parity import clone, tensors

    args, expected_args = clone(case.args), clone(case.args)
    found, wanted = tensors(impl.fn(*args)), tensors(op.reference(*expected_args))
    pairs = [*zip(found, wanted, strict=True), *zip(args, expected_args, strict=True)]
    for one, other in ((a, b) for a, b in pairs if isinstance(a, torch.Tensor)):
        assert one.dtype == other.dtype and one.shape == other.shape, (one.dtype, other.dtype, one.shape, other.shape)
        if one.numel() == 0:
            continue
        one, other = one.double(), other.double()
        assert torch.equal(one.isnan(), other.isnan()), "not the same rows are NaN"
        error = (one - other).nan_to_num(0.0).abs().max() / other.nan_to_num(0.0).abs().max().clamp(min=1e-6)
        assert error <= BOUND, f"off by {error:.2g} of the largest value"


def run_case(op: OpSpec, impl: Impl, case: Case, served: bool) -> None:
    from test_op_parity import check_case

    if served:
        run_as_served(op, impl, case)
    else:
        check_case(op, impl, case, on_matrix_units=True)


def variants(op: OpSpec, impl: Impl, served: dict[str, Case], text: str) -> Iterator[tuple[Case, bool]]:
    """Every case that the kernel takes, and whether it is one as served."""
    for case in cases_of(op):
        for variant, is_served in ((case, False), (as_served(op, case, served), True)):
            if variant is not None and text in variant.name and (impl.accepts is None or impl.accepts(*variant.args)):
                yield variant, is_served


def triton_impls(op: OpSpec, arch: str) -> list[Impl]:
    """The op's implementations by Triton that may run on ``arch``."""
    found = [impl for impl in op.impls if impl.name.startswith("triton")]
    return [impl for impl in found if impl.archs is None or arch.startswith(impl.archs)]


def emulate(op: OpSpec, arch: str, served: dict[str, Case], text: str) -> Report:
    """Run the op's Triton kernels for ``arch`` on every case whose name holds ``text``."""
    report = Report()
    runs = ((impl, *found) for impl in triton_impls(op, arch) for found in variants(op, impl, served, text))
    for impl, case, is_served in runs:
        with emulated(arch) as driver:
            try:
                run_case(op, impl, case, is_served)
            except EmulatorError as error:
                report.not_run.append(f"{case.name}: {error}")
            except AssertionError as error:
                report.disagree.append(f"{case.name}: {' '.join(str(error).split())[:200]}")
        report.cases += 1
        report.launches += len(driver.ran)
        report.instructions += sum(launch.run.instructions for launch in driver.ran)
    return report


def print_report(arch: str, op: OpSpec, report: Report, seconds: float) -> None:
    print(
        f"{arch} {op.name:<32} {report.cases:>4} cases {report.launches:>5} launches {report.instructions:>12,} "
        f"instructions {seconds:6.1f} s  {len(report.disagree)} disagree, {len(report.not_run)} not run",
        flush=True,
    )
    for word, lines in (("DISAGREES", report.disagree), ("NOT RUN", report.not_run)):
        for line in lines:
            print(f"  {word} {line}", flush=True)


def chosen_ops(names: list[str]) -> list[OpSpec]:
    """The ops with a Triton implementation whose name is, or starts with, one of ``names``; all without names."""
    REGISTRY.load_all()
    ops = [op for _, op in sorted(REGISTRY.ops.items()) if any(impl.name == "triton" for impl in op.impls)]
    unknown = [name for name in names if not any(op.name.startswith(name) for op in ops)]
    if unknown:
        raise SystemExit(
            f"error: no op with a Triton kernel is called {', '.join(unknown)}; see python -m sglang.kernels"
        )
    return [op for op in ops if not names or op.name.startswith(tuple(names))]


def emulate_all(arch: str, names: list[str], checkout: Path, text: str) -> list[Report]:
    """``emulate`` and report the ops ``names`` one after the other."""
    from sglang.test.amd_gate.gate import serving_cases

    use_tinygrad(checkout)
    REGISTRY.load_all()
    served: dict[str, Case] = {}
    for served_op, case in serving_cases():
        served.setdefault(served_op.name, case)
    reports = []
    with override_platform(ShapeOnlyPlatform(arch)):
        for op in (REGISTRY.ops[name] for name in names):
            started = time.perf_counter()
            reports.append(emulate(op, arch, served, text))
            print_report(arch, op, reports[-1], time.perf_counter() - started)
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help="an op, or how the names of several begin; default: all")
    parser.add_argument("--tinygrad", type=Path, metavar="DIR", help="root of a checkout of tinygrad")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds this")
    arguments = parser.parse_args()
    ops = chosen_ops(arguments.ops)
    checkout = arguments.tinygrad or envs.SGLANG_EMULATOR_TINYGRAD.get()
    try:
        if not checkout:
            raise EmulatorError("give a checkout of tinygrad by --tinygrad or SGLANG_EMULATOR_TINYGRAD")
        use_tinygrad(Path(checkout))
    except EmulatorError as error:
        print(f"NOT RUN: 0 cases of {len(ops)} ops: {error}")
        return NOT_RUN
    # Triton 3.6 converts to 8 bits, as long as a process lives, as for the first architecture that it compiles for.
    each = [(arch, [op.name for op in ops], Path(checkout), arguments.case) for arch in arguments.arch]
    reports = []
    for task in each:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            reports += pool.submit(emulate_all, *task).result()
    cases, disagree = sum(report.cases for report in reports), sum(len(report.disagree) for report in reports)
    not_run = sum(len(report.not_run) for report in reports)
    instructions = sum(report.instructions for report in reports)
    print(
        f"{cases - not_run} of {cases} cases ran, {instructions:,} instructions, {disagree} disagree, {not_run} not run"
    )
    print("values alone: time, waits, races and caches are not modelled, and nothing has run on AMD hardware")
    if disagree:
        return DISAGREES
    return PASSED if cases and not not_run else NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
