"""Starts scheduler and detokenizer processes, waits until they are ready, and ends them."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait as wait_for_data  # of descriptors of any number, unlike select.select
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
# Rounds that an OpenMP thread spins before it sleeps. libgomp's default spins for milliseconds: on a shared machine,
# threads then wait for one that lost its core (measured at batch 64: 870 instead of 10,000 tokens/s).
SPIN_COUNT = 1_000
# How long the failure of a rank that lost its peer is held back, so that the peer's own failure is reported instead: a
# killed process takes a while to release its device.
PEER_GRACE_S = 5.0
# After so much silence, a child is checked for being stopped by a signal.
STOPPED_AFTER_S = 1.0
# Stands for the report of a child that ended without one.
NO_REPORT: dict[str, Any] = {"lost_peer": False, "at": math.inf}


class LaunchError(RuntimeError):
    """A child process did not become ready. ``user_error``: True for a wrong setting, False for a crash."""

    def __init__(self, message: str, user_error: bool) -> None:
        super().__init__(message)
        self.user_error = user_error


def rank_places(args: ServerArgs) -> list[RankPlace]:
    """The place of every scheduler process of a server, in order of local rank."""
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
    """One child process: orders go to its stdin, reports come from ``ready_fd``, ``pulse`` counts turns of its loop."""

    name: str
    popen: subprocess.Popen[bytes]
    ready_fd: int
    pulse: PulseReader
    # What it reported when it was ready, before and after which it may fail.
    ready_info: dict[str, Any] | None = None
    # The error that it reported; "at" is the time in monotonic seconds.
    exit_report: dict[str, Any] | None = None
    # The signal by which somebody other than its parent asked it to end.
    asked_by: int | None = None
    _unread: bytes = b""

    @property
    def is_signalled(self) -> bool:
        """True when a signal ended it."""
        return (self.popen.poll() or 0) < 0

    def has_failed(self) -> bool:
        """True when it has ended, or has reported why it is about to end."""
        has_ended = self.popen.poll() is not None
        self._read_reports()
        return has_ended or self.exit_report is not None

    def _read_reports(self) -> None:
        """Take in the reports since the last call."""
        self._unread += os.read(self.ready_fd, 1 << 16) if wait_for_data([self.ready_fd], 0) else b""
        *lines, self._unread = self._unread.split(b"\n")
        for report in map(json.loads, lines):
            if report["status"] == "asked":
                self.asked_by = report["signal"]
            elif report["status"] == "ready":
                self.ready_info = report["info"]
            else:
                self.exit_report = self.exit_report or report

    @property
    def title(self) -> str:
        return f"{self.name} (pid {self.popen.pid})"

    def order_end(self) -> None:
        """Ask it to shut down; a child that a signal has stopped cannot react and is killed."""
        if is_stopped(self.popen.pid):
            self.popen.kill()
        elif self.popen.stdin is not None:
            with suppress(OSError):
                os.write(self.popen.stdin.fileno(), b"e")

    def close(self) -> None:
        """Close its descriptors; safe to call twice."""
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1
        if self.popen.stdin is not None:
            with suppress(OSError):
                self.popen.stdin.close()
        self.pulse.close()

    def end(self) -> str:
        """One sentence on how a failed child ended."""
        code = self.popen.poll()
        if code is not None and code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        else:
            how = "failed" if code is None else f"ended with exit code {code}"
        message = f": {self.exit_report['message']}" if self.exit_report is not None else ""
        return f"{self.title} {how}{message}"


@dataclass
class EngineProcesses:
    """The running children of one engine."""

    ipc: IpcNames
    processes: list[ChildProcess]
    watchdog_timeout_s: float = math.inf
    scheduler_info: dict[str, Any] = field(default_factory=dict)

    def check_alive(self) -> str | None:
        """None while all children make progress, else which child failed first and how, or which make no progress.

        A rank that loses its peer fails too. So a child that a signal ended is named first, then the first to report an
        error other than a lost peer. If only lost peers are reported, the peer has ``PEER_GRACE_S`` to end.
        """
        failed = [child for child in self.processes if child.has_failed()]
        if not failed:
            return self._check_progress()

        def order(child: ChildProcess) -> tuple[bool, bool, float]:
            report = child.exit_report or NO_REPORT
            return not child.is_signalled, report["lost_peer"], report["at"]

        first = min(failed, key=order)
        return first.end() if first.is_signalled or is_root_cause(first.exit_report or NO_REPORT) else None

    def _check_progress(self) -> str | None:
        """The children that a signal has stopped, else all silent ones (ranks wait for each other), else None."""
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
        """A child stopped or silent for more than ``most_s`` seconds at the last ``check_alive``; else None."""
        for child in self.processes:
            silent_s = child.pulse.last_silent_s
            if silent_s > most_s or silent_s > STOPPED_AFTER_S and is_stopped(child.popen.pid):
                return f"{child.title} has made no progress for {silent_s:.0f} s"
        return None

    def is_asked_to_end(self) -> bool:
        """True when a child received a signal that asks the whole server to end; updated by ``check_alive``."""
        return any(child.asked_by is not None for child in self.processes)

    def shutdown(self, grace_s: float = 5.0) -> None:
        """End all children: ask first, kill after ``grace_s`` seconds. Safe to call twice."""
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
            f"{num_ranks} ranks (--tp-size, times --dp-size for replicas) need one device each, and this host shows "
            f"{num_devices}: lower these flags, or check CUDA_VISIBLE_DEVICES / HIP_VISIBLE_DEVICES.",
            user_error=True,
        )


def launch_engine_processes(
    server_args: ServerArgs, ipc: IpcNames, child_variables: Mapping[str, str], needed: Mapping[str, int]
) -> EngineProcesses:
    """Start one scheduler per rank, with ``child_variables`` set, and one detokenizer; wait until all are ready.

    needed: bytes that a rank holds in addition to its pools, by purpose; empty if ranks do not need it.
    ``server_args`` must be resolved. Raises LaunchError with the child's own message if one fails; the others are
    ended first. ``ipc`` is removed if this fails, otherwise when the processes end.
    """
    # Imported here: the detokenizer process imports this module and must not import torch.
    from sglang.srt.platforms import current_platform

    engine = EngineProcesses(ipc, [], server_args.watchdog_timeout)
    # Children do not need the API keys.
    child_args = replace(server_args, api_key=None, admin_api_key=None)
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
                server_args=child_args, ipc=engine.ipc, place=place, dist_init_method=init_method, needed=dict(needed)
            )
            name = f"scheduler {place.label}".strip()
            engine.processes.append(_start(name, SCHEDULER_MODULE, config, threads, child_variables))
        config = LaunchConfig(server_args=child_args, ipc=engine.ipc)
        engine.processes.append(_start("detokenizer", DETOKENIZER_MODULE, config, 1, {}))
        for child in engine.processes:
            info = _wait_ready(child, engine)
            if child is engine.processes[0]:
                engine.scheduler_info = info
    except BaseException:
        engine.shutdown(grace_s=1.0)
        raise
    return engine


def _plain(value: Any) -> str | float:
    """Python's own form of numpy's numbers and texts, which settings may be."""
    return str(value) if isinstance(value, str) else float(value)


def _start(name: str, module: str, config: LaunchConfig, threads: int, variables: Mapping[str, str]) -> ChildProcess:
    ready_read, ready_write = os.pipe()
    pulse = PulseReader()
    environment = {**os.environ, **variables}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    command = [sys.executable, "-m", module, "--ready-fd", str(ready_write), "--pulse-fd", str(pulse.descriptor)]
    # In a session of its own, so that Ctrl-C reaches only the parent, which then shuts its children down.
    popen = subprocess.Popen(
        command,
        pass_fds=(ready_write, pulse.descriptor),
        env=environment,
        start_new_session=True,
        stdin=subprocess.PIPE,
    )
    os.close(ready_write)
    assert popen.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already; ``_wait_ready`` finds that out
        popen.stdin.write(msgspec.json.encode(config, enc_hook=_plain) + b"\n")
        popen.stdin.flush()
    return ChildProcess(name, popen, ready_read, pulse)


def _wait_ready(child: ChildProcess, engine: EngineProcesses) -> dict[str, Any]:
    """The info that ``child`` reports when ready; raises LaunchError if it or a sibling fails first."""
    started = last_logged = time.monotonic()
    while True:
        wait_for_data([child.ready_fd], 0.2)
        for one in engine.processes:
            _check_failure(one)
        if child.ready_info is not None and child.exit_report is None:
            return child.ready_info
        if time.monotonic() - last_logged > PROGRESS_INTERVAL_S:
            last_logged = time.monotonic()
            logger.info("waiting for %s (%.0f s)", child.name, last_logged - started)


def _check_failure(child: ChildProcess) -> None:
    """Raise LaunchError if ``child`` has failed, unless it lost a peer that may still say why."""
    if not child.has_failed():
        return
    report = child.exit_report
    if report is None:
        early = " before it was ready" if child.ready_info is None else ""
        raise LaunchError(f"{child.name} ended with exit code {child.popen.returncode}{early}.", user_error=False)
    if is_root_cause(report):
        raise LaunchError(report["message"], user_error=report["user_error"])


def is_root_cause(report: dict[str, Any]) -> bool:
    """False for the report of a rank that lost its peer, as long as that peer may still report a cause."""
    return not report["lost_peer"] or time.monotonic() > report["at"] + PEER_GRACE_S
