"""Starts scheduler and detokenizer processes, waits until they are ready, and ends them."""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from sglang.srt.managers.child_context import STACKS_SIGNAL, LaunchConfig, RankPlace
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.managers.pulse import PulseReader, is_stopped
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.common import get_free_port

logger = logging.getLogger(__name__)

SCHEDULER_MODULE = "sglang.srt.managers.scheduler_process"
DETOKENIZER_MODULE = "sglang.srt.managers.detokenizer_process"
PROGRESS_INTERVAL_S = 10.0
# Rounds that an OpenMP thread spins before it sleeps. libgomp's default spins for milliseconds: on a machine that is
# shared, threads then wait for one that was taken off its core (measured at batch 64: 870 against 10,000 tokens/s).
SPIN_COUNT = 1_000
# How long a rank that lost another may wait to be blamed: a killed process takes a while to give its device back.
PEER_GRACE_S = 5.0
# Silence of a child that is looked at for being stopped: one that turns is not.
STOPPED_AFTER_S = 1.0
# The words of a child that ended without any.
_SILENT: dict[str, Any] = {"lost_peer": False, "at": math.inf}


class LaunchError(RuntimeError):
    """A child process did not get ready. ``user_error`` tells a wrong setting from a crash."""

    def __init__(self, message: str, user_error: bool) -> None:
        super().__init__(message)
        self.user_error = user_error


def rank_places(args: ServerArgs) -> list[RankPlace]:
    """Every scheduler process of a server, by local rank."""
    places = []
    for local_rank in range(args.num_replicas * args.tp_size):
        replica, rank = divmod(local_rank, args.tp_size)
        dp_rank = rank // (args.tp_size // args.dp_size) if args.enable_dp_attention else replica
        names = [f"DP{dp_rank}"] if args.dp_size > 1 else []
        names += [f"TP{rank}"] if args.tp_size > 1 or names else []
        places.append(RankPlace(rank, local_rank, dp_rank, " ".join(names)))
    return places


@dataclass
class ChildProcess:
    """One child: its stdin takes orders, ``ready_fd`` brings its reports, ``pulse`` counts the turns of its loop."""

    name: str
    popen: subprocess.Popen[bytes]
    ready_fd: int
    pulse: PulseReader
    # The error that it reported while serving, and when (monotonic seconds).
    last_words: dict[str, Any] | None = None
    # The signal that somebody else than its parent sent it, to end it.
    asked_by: int | None = None

    @property
    def is_signalled(self) -> bool:
        """True when a signal ended it."""
        return (self.popen.poll() or 0) < 0

    def has_failed(self) -> bool:
        """True when it has ended, or said why it is about to."""
        self._read_reports()
        return self.last_words is not None or self.popen.poll() is not None

    def _read_reports(self) -> None:
        """Take in what an unready or serving child has said since the last call."""
        readable, _, _ = select.select([self.ready_fd], [], [], 0)
        data = os.read(self.ready_fd, 1 << 16) if readable else b""
        report = self.last_report(data) if data.endswith(b"\n") else None
        if report is not None and report["status"] == "error":
            self.last_words = self.last_words or report

    def last_report(self, lines: bytes) -> dict[str, Any] | None:
        """What counts of its reports: it may fail right after it was ready. Signals that it got are noted."""
        last = None
        for line in lines.splitlines():
            report: dict[str, Any] = json.loads(line)
            if report["status"] == "asked":
                self.asked_by = report["signal"]
            else:
                last = report
        return last

    @property
    def title(self) -> str:
        return f"{self.name} (pid {self.popen.pid})"

    def order_end(self) -> None:
        """Ask it to end in order; one that is stopped cannot hear that and is killed."""
        if is_stopped(self.popen.pid):
            self.popen.kill()
        elif self.popen.stdin is not None:
            with suppress(OSError):
                os.write(self.popen.stdin.fileno(), b"e")

    def close(self) -> None:
        """Give back descriptors; safe to call twice."""
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1
        if self.popen.stdin is not None:
            with suppress(OSError):
                self.popen.stdin.close()
        self.pulse.close()

    def end(self) -> str:
        """How a failed child ended."""
        code = self.popen.poll()
        if code is not None and code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        else:
            how = "failed" if code is None else f"ended with exit code {code}"
        words = f": {self.last_words['message']}" if self.last_words is not None else ""
        return f"{self.title} {how}{words}"


@dataclass
class EngineProcesses:
    """The running children of one engine."""

    ipc: IpcNames
    processes: list[ChildProcess]
    watchdog_timeout_s: float = math.inf
    scheduler_info: dict[str, Any] = field(default_factory=dict)

    def check_alive(self) -> str | None:
        """None while all children run and turn, else which one ended first and how, or which make no progress.

        A rank that loses another one fails too: whom a signal ended comes first, then who spoke first of those that did
        not lose another. When there is none yet, the one that was lost has ``PEER_GRACE_S`` to end.
        """
        failed = [child for child in self.processes if child.has_failed()]
        if not failed:
            return self._check_progress()

        def order(child: ChildProcess) -> tuple[bool, bool, float]:
            words = child.last_words or _SILENT
            return not child.is_signalled, words["lost_peer"], words["at"]

        first = min(failed, key=order)
        return first.end() if first.is_signalled or _has_cause(first.last_words or _SILENT) else None

    def _check_progress(self) -> str | None:
        """Whom a signal has stopped, else all that are silent: ranks wait for one another."""
        silent = [child for child in self.processes if child.pulse.silent_s() > self.watchdog_timeout_s]
        if not silent:
            return None
        stopped = [child for child in self.processes if is_stopped(child.popen.pid)]
        for child in () if stopped else silent:
            child.popen.send_signal(STACKS_SIGNAL)
        names = ", ".join(child.title for child in stopped or silent)
        what = "stopped by a signal: no" if stopped else "no"
        return f"{names}: {what} progress for more than --watchdog-timeout {self.watchdog_timeout_s:g} s"

    def stalled(self, most_s: float) -> str | None:
        """Which child a signal has stopped, or is silent for more than ``most_s``, as of the last ``check_alive``.

        It may go on, and until --watchdog-timeout the server waits for that.
        """
        for child in self.processes:
            silent_s = child.pulse.last_silent_s
            if silent_s > most_s or silent_s > STOPPED_AFTER_S and is_stopped(child.popen.pid):
                return f"{child.title} has made no progress for {silent_s:.0f} s"
        return None

    def is_asked_to_end(self) -> bool:
        """True when somebody sent a child a signal that is meant for the server as a whole; ``check_alive`` sees it."""
        return any(child.asked_by is not None for child in self.processes)

    def shutdown(self, grace_s: float = 5.0) -> None:
        """End all children: ask first, insist after ``grace_s`` seconds. Safe to call twice."""
        for child in self.processes:
            if child.popen.poll() is None:
                child.order_end()
        deadline = time.monotonic() + grace_s
        for child in self.processes:
            try:
                child.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.popen.kill()
                child.popen.wait()
            child.close()
        self.ipc.remove()


def _check_devices(num_ranks: int, num_devices: int | None) -> None:
    if num_devices is not None and num_ranks > num_devices:
        raise LaunchError(
            f"{num_ranks} ranks (--tp-size, times --dp-size for replicas) need a device each, and this host shows "
            f"{num_devices}: lower them, or look at CUDA_VISIBLE_DEVICES / HIP_VISIBLE_DEVICES.",
            user_error=True,
        )


def launch_engine_processes(
    server_args: ServerArgs, ipc: IpcNames, child_variables: Mapping[str, str], needed: Mapping[str, int]
) -> EngineProcesses:
    """Start one scheduler a rank, with ``child_variables`` set, and one detokenizer, and wait until all are ready.

    needed: bytes that a rank holds beside its pools, by purpose; empty where the ranks do not ask.
    ``server_args`` must be resolved. Raises LaunchError with the child's own words when one fails; the others are
    ended first. ``ipc`` is removed when this fails, else by the end of the processes.
    """
    # Here alone: the detokenizer's process reads this module and must stay without torch.
    from sglang.srt.platforms import current_platform

    engine = EngineProcesses(ipc, [], server_args.watchdog_timeout)
    # Children have no use for the keys.
    told = replace(server_args, api_key=None, admin_api_key=None).to_json()
    init_method = ""
    try:
        places = rank_places(server_args)
        _check_devices(len(places), current_platform.device_count())
        threads = max(1, (os.cpu_count() or 1) // len(places))
        for place in places:
            if place.rank == 0 and server_args.tp_size > 1:
                given = server_args.nccl_port
                port = get_free_port() if given is None else given + place.local_rank // server_args.tp_size
                init_method = f"tcp://127.0.0.1:{port}"
            config = LaunchConfig(
                server_args=told, ipc=engine.ipc, place=place, dist_init_method=init_method, needed=dict(needed)
            )
            name = f"scheduler {place.label}".strip()
            engine.processes.append(_start(name, SCHEDULER_MODULE, config, threads, child_variables))
        config = LaunchConfig(server_args=told, ipc=engine.ipc)
        engine.processes.append(_start("detokenizer", DETOKENIZER_MODULE, config, 1, {}))
        for child in engine.processes:
            info = _wait_ready(child, engine)
            if child is engine.processes[0]:
                engine.scheduler_info = info
    except BaseException:
        engine.shutdown(grace_s=1.0)
        raise
    return engine


def _start(name: str, module: str, config: LaunchConfig, threads: int, variables: Mapping[str, str]) -> ChildProcess:
    ready_read, ready_write = os.pipe()
    pulse = PulseReader()
    environment = {**os.environ, **variables}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    command = [sys.executable, "-m", module, "--ready-fd", str(ready_write), "--pulse-fd", str(pulse.descriptor)]
    # A session of its own: Ctrl-C reaches the parent alone, which then ends its children in order.
    popen = subprocess.Popen(
        command,
        pass_fds=(ready_write, pulse.descriptor),
        env=environment,
        start_new_session=True,
        stdin=subprocess.PIPE,
    )
    os.close(ready_write)
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already: its report pipe says so
        popen.stdin.write(msgspec.json.encode(config) + b"\n")
        popen.stdin.flush()
    return ChildProcess(name, popen, ready_read, pulse)


def _wait_ready(child: ChildProcess, engine: EngineProcesses) -> dict[str, Any]:
    """The info that ``child`` reports when ready; raises LaunchError when it or a sibling fails first."""
    received = b""
    started = last_word = time.monotonic()
    while True:
        readable, _, _ = select.select([child.ready_fd], [], [], 0.2)
        if readable:
            data = os.read(child.ready_fd, 1 << 16)
            received += data
            report = child.last_report(received) if received.endswith(b"\n") else None
            if report is not None:
                break
            if not data:
                code = child.popen.wait()
                raise LaunchError(f"{child.name} ended with exit code {code} before it was ready.", user_error=False)
        if time.monotonic() - last_word > PROGRESS_INTERVAL_S:
            last_word = time.monotonic()
            logger.info("waiting for %s (%.0f s)", child.name, last_word - started)
        _check_siblings(child, engine)
    if report["status"] != "ready":
        while not _has_cause(report):
            _check_siblings(child, engine)
            time.sleep(0.1)
        raise LaunchError(report["message"], user_error=report["user_error"])
    info: dict[str, Any] = report["info"]
    return info


def _check_siblings(child: ChildProcess, engine: EngineProcesses) -> None:
    for sibling in engine.processes:
        if sibling is child or sibling.popen.poll() is None or not sibling.has_failed():
            continue
        words = sibling.last_words
        if words is None:
            raise LaunchError(f"{sibling.name} ended with exit code {sibling.popen.returncode}.", user_error=False)
        if _has_cause(words):
            raise LaunchError(words["message"], user_error=words["user_error"])


def _has_cause(words: dict[str, Any]) -> bool:
    """False for the words of a rank that lost another, while that one may still end and be blamed."""
    return not words["lost_peer"] or time.monotonic() > words["at"] + PEER_GRACE_S
