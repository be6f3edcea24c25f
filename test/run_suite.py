"""Run the registered test files of one or more suites, each file in its own process, and count test cases.

    python test/run_suite.py --hw cpu --suite stage-a-test-cpu

A file that crashes, times out or runs no test counts as a failure; a skipped case is never counted as passed, and a
file that is skipped whole fails the run. The last line printed is ``N passed, N failed, N skipped``; the exit status
is 0 only if nothing failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "python"))

from preloaded import ForkedFile, Preloaded  # noqa: E402
from sglang.test.ci.ci_register import (  # noqa: E402
    BACKENDS,
    FOREIGN_BACKENDS,
    CIRegistration,
    auto_partition,
    collect_tests,
    valid_suites,
)

# What a backend's device is called by the platform layer, for the "executed on" line.
DEVICE_KIND = {"amd": "hip"}
FAILURE_TAIL_CHARS = 20_000

_RAN = re.compile(r"^Ran (\d+) tests? in ", re.MULTILINE)
_VERDICT = re.compile(r"^(OK|FAILED|NO TESTS RAN)(?: \((.*)\))?$", re.MULTILINE)
_SKIP_REASON = re.compile(r"\.\.\. skipped (['\"])(.*)\1$", re.MULTILINE)
# A second run cannot fix these; accuracy, speed and time-outs may pass on another try.
_CODE_ERROR = re.compile(
    r"^(\w+\.)*(SyntaxError|ImportError|ModuleNotFoundError|NameError|TypeError|AttributeError|KeyError|IndexError"
    r"|RuntimeError|ValueError|OutOfMemoryError|MemoryError)\b|out of memory|Segmentation fault",
    re.MULTILINE,
)


@dataclass(frozen=True)
class FileResult:
    """Outcome of one test file: case counts, wall seconds, and why it failed (empty when it did not)."""

    filename: str
    suite: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    est_time: float
    attempts: int = 1
    reason: str = ""
    skip_reasons: tuple[str, ...] = ()

    @property
    def executed(self) -> bool:
        return self.passed + self.failed > 0


def count_cases(output: str, returncode: int) -> tuple[int, int, int, str]:
    """(passed, failed, skipped, reason) from a file's unittest output and exit status.

    The last summary counts, as a test may itself print one. No summary, a bad status without a failing case and an
    empty run are each at least one failure.
    """
    ran = list(_RAN.finditer(output))
    verdict = _VERDICT.search(output, ran[-1].end()) if ran else None
    if verdict is None:
        died = f"killed by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        return 0, 1, 0, f"no unittest summary ({died})"
    counts = {key: int(number) for key, number in re.findall(r"([a-z ]+)=(\d+)", verdict[2] or "")}
    counts = {key.strip(): number for key, number in counts.items()}
    failed = counts.get("failures", 0) + counts.get("errors", 0) + counts.get("unexpected successes", 0)
    skipped = counts.get("skipped", 0) + counts.get("expected failures", 0)
    passed = max(0, int(ran[-1][1]) - failed - skipped)
    if returncode != 0 and failed == 0:
        return passed, 1, skipped, f"exit status {returncode} after its tests: {verdict[1]}"
    if passed + failed + skipped == 0:
        return 0, 1, 0, "ran no test"
    return passed, failed, skipped, f"{failed} failing" if failed else ""


def run_file(
    path: Path,
    registration: CIRegistration,
    timeout: float,
    failfast: bool,
    verbose: bool,
    preloaded: Preloaded | None = None,
) -> FileResult:
    """Run one file as ``python FILE -v`` in a process group and a temporary folder of its own; ``timeout`` in seconds.

    Whatever the file started and left running is ended with it.
    """
    argv = [str(path), "-v", *(["-f"] if failfast else [])]
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO / "python"), env.get("PYTHONPATH")]))
    began = time.monotonic()
    folder = tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True)
    with folder, tempfile.NamedTemporaryFile() as log:
        env["TMPDIR"] = folder.name
        if preloaded is not None:
            process = preloaded.start(argv, env, log.name)
        else:
            process = subprocess.Popen(
                [sys.executable, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,
            )  # fmt: skip
        _running.add(process)
        timed_out = False
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            returncode = -signal.SIGKILL
        finally:
            _kill_group(process)
            _running.discard(process)
        seconds = time.monotonic() - began
        log.seek(0)
        output = log.read().decode(errors="replace")
    passed, failed, skipped, reason = count_cases(output, returncode)
    if timed_out:
        passed, failed, skipped, reason = 0, 1, 0, f"timed out after {timeout:.0f} s"
    if verbose or failed:
        print(output[-FAILURE_TAIL_CHARS:].rstrip(), flush=True)
    skip_reasons = tuple(sorted({text for _, text in _SKIP_REASON.findall(output)}))
    if failed and not timed_out and _CODE_ERROR.search(output):
        reason += " (code error)"
    return FileResult(
        registration.filename,
        registration.suite,
        passed,
        failed,
        skipped,
        seconds,
        registration.est_time,
        reason=reason,
        skip_reasons=skip_reasons,
    )


_running: set[subprocess.Popen | ForkedFile] = set()


def _kill_group(process: subprocess.Popen | ForkedFile) -> None:
    """End what is left of the file's process group; the leader's id names the group, even after it has exited."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_with_retry(
    path: Path, registration: CIRegistration, args: argparse.Namespace, preloaded: Preloaded | None
) -> FileResult:
    """One file, run again after a failure that a second run may fix, if ``--enable-retry`` says so."""
    attempts = args.max_attempts if args.enable_retry else 1
    timeout = args.timeout_per_file
    for attempt in range(1, attempts + 1):
        result = run_file(path, registration, timeout, not args.continue_on_error, args.verbose, preloaded)
        result = replace(result, attempts=attempt)
        if not result.failed or result.reason.endswith("(code error)") or attempt == attempts:
            return result
        print(f"retry in {args.retry_wait_seconds} s: {registration.filename}: {result.reason}", flush=True)
        time.sleep(args.retry_wait_seconds)
        timeout += args.retry_timeout_increase
    raise AssertionError("max_attempts is checked to be at least 1")


def select(registrations: Sequence[CIRegistration], args: argparse.Namespace, suite: str) -> list[CIRegistration]:
    """The registrations of one suite that this run is to execute, partitioned if asked for."""
    chosen = [r for r in registrations if (r.backend, r.suite, r.nightly) == (args.hw, suite, args.nightly)]
    if not chosen:
        print(
            f"No tests found for hw={args.hw} suite={suite} nightly={args.nightly}: nothing is registered", flush=True
        )
    for registration in chosen:
        if registration.disabled is not None:
            print(f"disabled: {registration.filename}: {registration.disabled}", flush=True)
    enabled = [r for r in chosen if r.disabled is None]
    if args.auto_partition_size is not None:
        timings = _read_timings(args.partition_model_file)
        timed = {r.filename: replace(r, est_time=timings.get(r.filename, r.est_time)) for r in enabled}
        enabled = auto_partition(timed.values(), args.auto_partition_id, args.auto_partition_size)
    return sorted(enabled, key=lambda r: r.filename)


def write_timings(results: Sequence[FileResult], path: str) -> None:
    """One JSON line a file, which ``--partition-model-file`` reads."""
    rows = ({"file": r.filename, "suite": r.suite, "seconds": round(r.seconds, 2), "failed": r.failed} for r in results)
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _read_timings(path: str | None) -> dict[str, float]:
    """Seconds by file name, from the JSON lines of an earlier run's ``--timings-file``."""
    if path is None:
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    return {row["file"]: float(row["seconds"]) for row in rows}


def run_suite(registrations: Sequence[CIRegistration], args: argparse.Namespace, suite: str) -> list[FileResult]:
    """Run one suite's files, ``--jobs`` at once, printing begin and end lines; after a failing file no other begins,
    unless told."""
    chosen = select(registrations, args, suite)
    began = time.monotonic()
    stops = threading.Event()
    preloaded = Preloaded(args.preload.split(",")) if args.preload else None

    def run(number: int, registration: CIRegistration) -> FileResult | None:
        if stops.is_set():
            return None
        print(f"Begin ({number}/{len(chosen)}) {registration.filename}", flush=True)
        result = run_with_retry(Path(args.root) / registration.filename, registration, args, preloaded)
        verdict = f"FAILED ({result.reason})" if result.failed else "ok" if result.executed else "skipped"
        print(
            f"End   ({number}/{len(chosen)}) {registration.filename}: {verdict}, "
            f"{result.seconds:.1f} s (estimate {registration.est_time:g} s)",
            flush=True,
        )
        if result.failed and not args.continue_on_error:
            stops.set()
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            found = list(pool.map(run, range(1, len(chosen) + 1), chosen))
        except BaseException:
            stops.set()
            for process in list(_running):
                _kill_group(process)
            raise
    results = [result for result in found if result is not None]
    if len(results) < len(chosen):
        print(f"stopped at the first failing file, {len(chosen) - len(results)} not run (see --continue-on-error)")
    print(f"suite {suite}: {len(results)} of {len(chosen)} files, {time.monotonic() - began:.1f} s", flush=True)
    return results


def summarize(registrations: Sequence[CIRegistration], results: Sequence[FileResult], hw: str) -> None:
    """Print the table of files, the lists by outcome, and registered against executed."""
    width = max([4, *(len(r.filename) for r in results)])
    print(f"\n {'file':<{width}} | passed | failed | skipped | seconds | estimate")
    print(f"-{'-' * width}-+--------+--------+---------+---------+---------")
    for r in results:
        counts = f"{r.passed:>6} | {r.failed:>6} | {r.skipped:>7}"
        print(f" {r.filename:<{width}} | {counts} | {r.seconds:>7.1f} | {r.est_time:>8g}")
    for title, chosen in (
        ("PASSED", [r for r in results if not r.failed and r.executed]),
        ("FAILED", [r for r in results if r.failed]),
        ("SKIPPED (not a pass)", [r for r in results if not r.executed]),
        ("RETRIED", [r for r in results if r.attempts > 1]),
    ):
        if chosen and title != "PASSED":
            print(f"{title}:", *(f"  {r.filename} {r.reason}".rstrip() for r in chosen), sep="\n")
        else:
            print(f"{title}: {len(chosen)} files")
    for r in results:
        for reason in r.skip_reasons:
            print(f"skipped in {r.filename}: {reason}")
    for backend in sorted({r.backend for r in registrations} | {hw}):
        registered = len({r.filename for r in registrations if r.backend == backend})
        executed = sum(r.executed for r in results) if backend == hw else 0
        print(f"registered {backend} {registered}, executed on {DEVICE_KIND.get(backend, backend)} {executed}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hw", required=True, choices=[b for b in BACKENDS if b not in FOREIGN_BACKENDS])
    parser.add_argument("--suite", required=True, action="append", help="may be given several times")
    parser.add_argument("--nightly", action="store_true", help="select the nightly registrations")
    parser.add_argument("--timeout-per-file", type=float, default=1200, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, default=1, help="files that run at once")
    parser.add_argument(
        "--preload", metavar="MODULES", help="comma-separated; each file runs in a process forked with them imported"
    )
    parser.add_argument("--continue-on-error", action="store_true", help="do not stop at the first failing file")
    parser.add_argument("--auto-partition-id", type=int)
    parser.add_argument("--auto-partition-size", type=int)
    parser.add_argument("--partition-model-file", metavar="FILE", help="the --timings-file of an earlier run")
    parser.add_argument("--timings-file", metavar="FILE", help="write the seconds of each file there, as JSON lines")
    parser.add_argument("--enable-retry", action="store_true", help="one more run unless the failure is a code error")
    parser.add_argument("--max-attempts", type=int, default=2)
    parser.add_argument("--retry-wait-seconds", type=float, default=60)
    parser.add_argument("--retry-timeout-increase", type=float, default=600)
    parser.add_argument("--verbose", action="store_true", help="print the output of passing files too")
    parser.add_argument("--root", default=str(REPO / "test" / "registered"), help="folder of the registered tests")
    args = parser.parse_args(argv)
    if (args.auto_partition_id is None) != (args.auto_partition_size is None):
        parser.error("--auto-partition-id and --auto-partition-size come together")
    if args.auto_partition_size is not None and not 0 <= args.auto_partition_id < args.auto_partition_size:
        parser.error(f"--auto-partition-id {args.auto_partition_id} is not in [0, {args.auto_partition_size})")
    for flag in ("max_attempts", "jobs"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    allowed = valid_suites(args.hw, args.nightly)
    for suite in args.suite:
        if suite not in allowed:
            parser.error(f"unknown suite {suite!r} for --hw {args.hw}; one of: {', '.join(allowed)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Threads that spin for long wait for one another on a shared runner; servers set the same for themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        registrations = collect_tests(Path(args.root).rglob("*.py"), root=args.root)
    except ValueError as error:
        print(f"error: {error}\n0 passed, 1 failed, 0 skipped")
        return 1
    results: list[FileResult] = []
    for suite in args.suite:
        results += run_suite(registrations, args, suite)
        if not args.continue_on_error and any(r.failed for r in results):
            break
    summarize(registrations, results, args.hw)
    passed, failed, skipped = (sum(getattr(r, key) for r in results) for key in ("passed", "failed", "skipped"))
    if args.timings_file is not None:
        write_timings(results, args.timings_file)
    idle = sum(not r.executed for r in results)
    if idle:
        files = "1 file ran no test" if idle == 1 else f"{idle} files ran no test"
        print(f"error: {files} on {DEVICE_KIND.get(args.hw, args.hw)}, all were skipped; that is not a pass")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or idle else 0


if __name__ == "__main__":
    sys.exit(main())
