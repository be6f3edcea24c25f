"""What registered tests share: the test case base class, free ports, and starting a server and waiting for it."""

from __future__ import annotations

import atexit
import importlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from unittest import mock
from urllib.parse import urlparse

from sglang.srt.environ import envs
from sglang.test.process_tree import kill_process_tree

R = TypeVar("R")

__all__ = [
    "DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH",
    "DEFAULT_URL_FOR_TEST",
    "CustomTestCase",
    "free_url",
    "kill_process_tree",
    "popen_launch_server",
]


def launch_timeout() -> float:
    """Seconds a server may take to get ready: runners load large checkpoints cold, AMD's from slow disks."""
    if envs.SGLANG_IS_IN_CI_AMD.get():
        return 3600.0
    return 600.0 if envs.SGLANG_IS_IN_CI.get() else 120.0


DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH = launch_timeout()
POLL_SECONDS = 0.05
OUTPUT_TAIL_CHARS = 6_000
# What the product keeps for the whole process and sets while it builds a model or an engine.
PROCESS_STATE = {
    "sglang.srt.server_args": ("_global_server_args",),
    "sglang.srt.distributed.parallel_state": ("_state",),
    "sglang.srt.models.qwen3_5": (
        "_hip_use_alt_stream",
        "_cuda_use_alt_stream",
        "_gdn_use_alt_stream",
        "_qknorm_use_alt_stream",
        "_streams",
    ),
}


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Restore the environment and, where torch is imported before the block, the process state after it."""
    owners = {name: importlib.import_module(name) for name in PROCESS_STATE if "torch" in sys.modules}
    before = [(owner, field, getattr(owner, field)) for name, owner in owners.items() for field in PROCESS_STATE[name]]
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            for owner, field, value in before:
                setattr(owner, field, value)


class CustomTestCase(unittest.TestCase):
    """TestCase that ends ``cls.process`` and runs ``tearDownClass`` also when ``setUpClass`` raises.

    Each test leaves environment and process state as it found them, so that files share a process in any order.
    """

    def run(self, result: unittest.TestResult | None = None) -> Any:
        with process_state_kept():
            return super().run(result)

    if sys.version_info < (3, 11):

        def enterContext(self, manager: AbstractContextManager[R]) -> R:
            entered = manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)
            return entered

        @classmethod
        def enterClassContext(cls, manager: AbstractContextManager[R]) -> R:
            entered = manager.__enter__()
            cls.addClassCleanup(manager.__exit__, None, None, None)
            return entered

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "setUpClass" not in cls.__dict__:
            return
        original = cls.__dict__["setUpClass"].__func__

        def set_up_class(klass) -> None:
            try:
                original(klass)
            except BaseException:
                process = getattr(klass, "process", None)
                try:
                    klass.tearDownClass()
                except Exception as error:
                    # The first failure is the one to report; tearDownClass may rest on what setUpClass never made.
                    print(f"tearDownClass after a failed setUpClass: {error!r}", file=sys.stderr)
                if process is not None and process.poll() is None:
                    kill_process_tree(process.pid)
                raise

        cls.setUpClass = classmethod(set_up_class)  # type: ignore[assignment]


def free_url() -> str:
    """``http://127.0.0.1:PORT`` with a free port, for the ``base_url`` of one test class.

    The port is below those that the system gives to connections (32768 on Linux), so that no other test which runs at
    the same time takes it before the server listens.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return f"http://127.0.0.1:{port}"
        except OSError:
            continue


# Chosen at import: each test file is a process of its own, so files that run at once do not meet.
DEFAULT_URL_FOR_TEST = free_url()


def popen_launch_server(
    model: str | None,
    base_url: str,
    timeout: float = DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    api_key: str | None = None,
    other_args: Sequence[str] | None = None,
    env: dict[str, str] | None = None,
    return_stdout_stderr: tuple[IO, IO] | None = None,
    device: str = "auto",
) -> subprocess.Popen:
    """Start ``python -m sglang.launch_server`` and wait until ``/health_generate`` answers 200.

    ``model`` None serves the embedded model; ``timeout`` in seconds; ``env`` is merged over ``os.environ``;
    ``return_stdout_stderr`` are two files that take the output; without them it goes to ``process.log_path``, which
    is removed when the test process ends. Raises RuntimeError with the end of the output
    when the server exits early, TimeoutError (after ending the server) when it is not ready in time.
    """
    url = urlparse(base_url)
    command = [sys.executable, "-m", "sglang.launch_server", "--host", str(url.hostname), "--port", str(url.port)]
    command += ["--model-path", model] if model is not None else []
    command += ["--api-key", api_key] if api_key else []
    command += ["--device", device] if device != "auto" else []
    command += [str(argument) for argument in other_args or ()]
    child_env = {**os.environ, **(env or {})}
    # The output goes to a file: a pipe that nobody reads would stop the server once it is full.
    log_path: Path | None = None
    if return_stdout_stderr is None:
        handle, name = tempfile.mkstemp(prefix="sglang_test_server_", suffix=".log")
        log_path = Path(name)
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=child_env)
        os.close(handle)
        process.log_path = log_path  # type: ignore[attr-defined]
        atexit.register(log_path.unlink, missing_ok=True)
    else:
        out, err = return_stdout_stderr
        process = subprocess.Popen(command, stdout=out, stderr=err, env=child_env)
    try:
        _wait_until_ready(process, base_url, timeout, api_key, command)
    except BaseException as error:
        if process.poll() is None:
            kill_process_tree(process.pid)
            process.wait()
        if isinstance(error, (RuntimeError, TimeoutError)) and log_path is not None:
            raise type(error)(f"{error}\n--- end of its output ---\n{_tail(log_path)}") from None
        raise
    return process


def _wait_until_ready(
    process: subprocess.Popen, base_url: str, timeout: float, api_key: str | None, command: list[str]
) -> None:
    request = urllib.request.Request(f"{base_url}/health_generate")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    deadline = time.monotonic() + timeout
    # A proxy set for the outside world must not see loopback traffic.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    last = "no answer yet"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with status {process.returncode} before it was ready: {command}")
        try:
            with opener.open(request, timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"the server was not ready within {timeout:.0f} s (last: {last}): {command}")


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-OUTPUT_TAIL_CHARS:]
