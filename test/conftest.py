"""``pytest test/registered`` runs what the CPU suites of each commit hold, each file in a process of its own.

Files change their process (fakes, platforms, variables), so several of them do not share one. A file that is named
alone (``pytest test/registered/unit/test_size.py -k budget``) runs in pytest's process, case by case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "python"
sys.path.insert(0, str(PACKAGE))
# Before files that run here change it.
ENVIRON = dict(os.environ)
SHOWN_LINES = 60


def is_in_cpu_suites(path: Path) -> bool:
    from sglang.test.ci.ci_register import CPU_SUITES, parse_registrations

    found = parse_registrations(path)
    return any(one.backend == "cpu" and one.suite in CPU_SUITES and one.disabled is None for one in found)


def is_named(config: pytest.Config, path: Path) -> bool:
    """True for a file that stands on the command line itself."""
    named = {(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args}
    return path.resolve() in named


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if is_named(parent.config, module_path):
        return None  # as pytest does
    return RegisteredFile.from_parent(parent, path=module_path)


class RegisteredFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        if is_in_cpu_suites(self.path):
            yield WholeFile.from_parent(self, name="process")


class FileFailure(Exception):
    """What a file printed last."""


class WholeFile(pytest.Item):
    def runtest(self) -> None:
        environ = {**ENVIRON, "PYTHONPATH": os.pathsep.join([str(PACKAGE), ENVIRON.get("PYTHONPATH", "")])}
        command = [sys.executable, str(self.path)]
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise FileFailure("\n".join(done.stdout.splitlines()[-SHOWN_LINES:]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, str(self.path.name)
