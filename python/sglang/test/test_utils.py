"""What registered tests share: the test case base class, free ports, and starting a server and waiting for it."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlparse

from sglang.srt.environ import envs
from sglang.srt.utils.common import kill_process_tree

__all__ = [
    "DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH",
    "DEFAULT_URL_FOR_TEST",
    "CustomTestCase",
    "find_available_port",
    "free_url",
    "kill_process_tree",
    "popen_launch_server",
]



def _launch_timeout() -> float:
    """Seconds a server may take to get ready: runners load large checkpoints cold, AMD's from slow disks."""
    if envs.SGLANG_IS_IN_CI_AMD.get():
        return 3600.0
    return 600.0 if envs.SGLANG_IS_IN_CI.get() else 120.0


DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH = _launch_timeout()
POLL_SECONDS = 0.25
OUTPUT_TAIL_CHARS = 6_000


class CustomTestCase(unittest.TestCase):
    """TestCase that ends ``cls.process`` and runs ``tearDownClass`` also when ``setUpClass`` raises."""

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


def find_available_port() -> int:
    """A TCP port of the loopback address that nothing listened on a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_url() -> str:
    """``http://127.0.0.1:PORT`` with a free port, for the ``base_url`` of one test class."""
    return f"http://127.0.0.1:{find_available_port()}"


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
