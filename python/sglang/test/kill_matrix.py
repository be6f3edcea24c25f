"""One cell of the kill matrix: a server, clients at one stage, one signal to one process, and the expected outcome."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from sglang.srt.entrypoints.shutdown import EXIT_CUT
from sglang.test.test_utils import free_url, kill_process_tree, popen_launch_server

PROCESSES = ("main", "scheduler", "detokenizer")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STAGES = ("idle", "queued", "prefill", "decode", "streaming")

DRAIN_S = 2
WATCHDOG_S = 6
# Only against hangs: test machines are shared.
PATIENCE_S = 120.0
# What an idle server may compute to end, all processes together; interpreters that end in their own way take two.
MAX_END_CPU_S = 1.0
FLAGS = (
    "--max-running-requests", "2", "--chunked-prefill-size", "16", "--skip-server-warmup", "--disable-radix-cache",
    "--drain-timeout", str(DRAIN_S), "--watchdog-timeout", str(WATCHDOG_S),
)  # fmt: skip
LONG_OUTPUT = {"max_new_tokens": 4000, "ignore_eos": True, "temperature": 0}


def _reaped_cpu_s() -> float:
    """CPU seconds of all processes that have been waited for, their own children included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Client:
    """One request in a thread: the chunks that came before the end, and how it ended."""

    url: str
    stream: bool
    num_prompt: int = 2
    status: int | None = None
    chunks: list[str] = field(default_factory=list)
    error: str = ""
    ended_at: float = 0.0

    def start(self) -> Client:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        body = {"input_ids": [5] * self.num_prompt, "sampling_params": LONG_OUTPUT, "stream": self.stream}
        try:
            with httpx.stream("POST", f"{self.url}/generate", json=body, timeout=2 * PATIENCE_S) as reply:
                self.status = reply.status_code
                if self.stream and self.status == 200:
                    self.chunks.extend(line for line in reply.iter_lines() if line)
                else:
                    self.chunks.append(reply.read().decode())
        except httpx.HTTPError as error:
            self.error = repr(error)
        self.ended_at = time.monotonic()

    def outcome(self) -> str:
        """``503``, ``200 then 503`` for an error event before [DONE], ``dropped``, or what is wrong with the answer."""
        if self.thread.is_alive():
            return "no answer"
        if self.error:
            return "dropped"
        if self.status != 200:
            return str(self.status)
        if not self.stream:
            return "200"
        if not self.chunks or self.chunks[-1] != "data: [DONE]":
            return "200 without [DONE]"
        last = json.loads(self.chunks[-2].removeprefix("data: "))
        return f"200 then {last['error']['code']}" if "error" in last else "200"


class Cell:
    """Runs one cell; AssertionError if the outcome is not the expected one."""

    def __init__(self, process: str, signum: signal.Signals, stage: str) -> None:
        self.process, self.signum, self.stage = process, signum, stage
        self.name = f"{process} {signum.name} {stage}"

    def run(self) -> str:
        """One line: what was seen."""
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            self.url = free_url()
            self.server = popen_launch_server(None, self.url, other_args=FLAGS, env={"TMPDIR": folder})
            self.log = self.server.log_path  # type: ignore[attr-defined]
            self.children = psutil.Process(self.server.pid).children()
            try:
                return self._run()
            except AssertionError as error:
                raise AssertionError(f"{self.name}: {error}\n{self.log.read_text()[-3000:]}") from None
            finally:
                for child in self.children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                kill_process_tree(self.server.pid)
                self.server.wait()
                self.log.unlink()

    def _run(self) -> str:
        clients = self._reach_stage()
        used_s = sum(sum(p.cpu_times()[:2]) for p in (psutil.Process(self.server.pid), *self.children))
        before_s = _reaped_cpu_s()
        began = time.monotonic()
        os.kill(self._pid(), self.signum)
        if (self.process, self.signum) == ("main", signal.SIGSTOP):
            # No client is connected; what counts is that nothing is lost when it continues.
            time.sleep(WATCHDOG_S + 2)
            os.kill(self._pid(), signal.SIGCONT)
            assert httpx.get(f"{self.url}/ready", timeout=PATIENCE_S).status_code == 200, "does not go on"
            self.server.send_signal(signal.SIGTERM)
        for client in clients:
            client.thread.join(PATIENCE_S)
        outcomes = sorted({client.outcome() for client in clients})
        told_s = max((client.ended_at - began for client in clients), default=0.0)
        try:
            code = self.server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError("the server does not end") from None
        ended_s = time.monotonic() - began
        if self.stage == "idle" and self.signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            cpu_s = _reaped_cpu_s() - before_s - used_s
            assert cpu_s < MAX_END_CPU_S, f"the end takes {cpu_s:.1f} CPU seconds"
        _, alive = psutil.wait_procs(self.children, timeout=PATIENCE_S)
        assert not alive, f"orphans: {alive}"
        self._until(lambda: not os.listdir(self.folder), "the temporary folder is not empty")
        seen = (
            f"{self.name:30} exit {code:3} {', '.join(outcomes) or '-':20} told {told_s:5.1f} s, ended {ended_s:5.1f} s"
        )
        wanted_code, wanted = self._wanted()
        assert code == wanted_code, f"exit status {code}, not {wanted_code}"
        assert set(outcomes) <= wanted and bool(outcomes) == bool(clients), f"clients: {outcomes}, not {wanted}"
        log = self.log.read_text()
        assert "Traceback" not in log, "a traceback"
        if wanted_code == 1:
            words = "stopped by a signal" if self.signum == signal.SIGSTOP else "was ended by signal 9"
            assert f"{self.process} (pid {self._pid()})" in log and words in log, "the log does not name the process"
        return seen

    def _wanted(self) -> tuple[int, set[str]]:
        """The exit status, and the outcomes that clients may see."""
        hard = self.signum in (signal.SIGKILL, signal.SIGSTOP)
        if self.process == "main" and self.signum == signal.SIGKILL:
            return -signal.SIGKILL, {"dropped"}
        if self.process != "main" and hard:
            return 1, {"500", "200 then 500"}
        return (0 if self.stage == "idle" else EXIT_CUT), {"503", "200 then 503"}

    def _pid(self) -> int:
        if self.process == "main":
            return self.server.pid
        return next(child.pid for child, line in self._command_lines if f"{self.process}_process" in line)

    def _reach_stage(self) -> list[Client]:
        self._command_lines = [(child, " ".join(child.cmdline())) for child in self.children]
        stage = self.stage
        stage = self.stage
        if stage == "idle":
            return []
        if stage == "prefill":
            clients = [Client(self.url, stream, num_prompt=3800).start() for stream in (False, True)]
            self._until(lambda: self._state("num_prefilled_tokens") > 0, "no prefill")
            return clients
        kinds = {"queued": (True, False, True, False), "decode": (False, False), "streaming": (True, True)}[stage]
        clients = [Client(self.url, kind).start() for kind in kinds]
        self._until(lambda: self._state("num_generated_tokens") > 4, "nothing is generated")
        if stage == "queued":
            self._until(lambda: self._state("num_queue_reqs") == 2, "nothing waits")
        if stage == "streaming":
            self._until(lambda: all(len(client.chunks) > 2 for client in clients), "no chunks")
        return clients

    def _state(self, name: str) -> Any:
        info = httpx.get(f"{self.url}/server_info", timeout=PATIENCE_S).json()
        return info["internal_states"][0][name]

    def _until(self, condition: Callable[[], Any], otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.05)
