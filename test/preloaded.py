"""Runs test files in processes that are forked with their slow imports done: torch alone takes a file's start seconds.

The imports must be of other packages: what this project imports depends on the environment of each file.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess


class Preloaded:
    """Starts files as ``python FILE ARGS`` does, from a process that has imported ``modules``."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*modules])

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: str) -> ForkedFile:
        """Run the file ``argv[0]`` in a session of its own; what it prints goes to the file ``log``."""
        process = self._context.Process(target=_run, args=(list(argv), dict(env), log))
        process.start()
        return ForkedFile(argv, process)


class ForkedFile:
    """A file that runs; the part of ``subprocess.Popen`` that the runner uses."""

    def __init__(self, argv: Sequence[str], process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._argv, self._process = list(argv), process

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal; raises TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._argv, timeout or 0)
        return self._process.exitcode


def _run(argv: list[str], env: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    for name, flags, targets in ((os.devnull, os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_APPEND, (1, 2))):
        opened = os.open(name, flags)
        for target in targets:
            os.dup2(opened, target)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = argv
    sys.path[:0] = [os.path.dirname(argv[0]), *env["PYTHONPATH"].split(os.pathsep)]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
