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
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang.srt.environ import EnvError
from sglang.srt.managers.ipc import IpcNames
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
# The words of a child that ended without any.
_SILENT: dict[str, Any] = {"lost_peer": False, "at": math.inf}
# What a pipe takes at once, whatever the characters: a dying child must not wait for a reader.
MAX_WORDS = 8_000


class LaunchError(RuntimeError):
    """A child process did not get ready. ``user_error`` tells a wrong setting from a crash."""

    def __init__(self, message: str, user_error: bool) -> None:
        super().__init__(message)
        self.user_error = user_error


class RankPlace(msgspec.Struct, frozen=True):
    """Where a scheduler process stands.

    ``rank`` counts the ranks of its replica, ``local_rank`` all ranks of the host (its device), ``dp_rank`` replicas or
    attention groups, whichever there are several of. ``label`` is its name in logs, empty for the only rank.
    """

    rank: int = 0
    local_rank: int = 0
    dp_rank: int = 0
    label: str = ""


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


class LaunchConfig(msgspec.Struct, kw_only=True):
    """What a child process is told, as JSON in a file that only this user can read."""

    server_args: str
    ipc: IpcNames
    place: RankPlace = RankPlace()
    dist_init_method: str = ""

    def parsed_server_args(self) -> ServerArgs:
        return ServerArgs.from_json(self.server_args)


@dataclass
class ChildProcess:
    """One child, the pipe on which it reports ready, and the pipe whose end tells it that the parent died."""

    name: str
    popen: subprocess.Popen[bytes]
    ready_fd: int
    lifeline_fd: int
    # The error that it reported while serving, and when (monotonic seconds).
    last_words: dict[str, Any] | None = None

    @property
    def is_signalled(self) -> bool:
        """True when a signal ended it."""
        return (self.popen.poll() or 0) < 0

    def has_failed(self) -> bool:
        """True when it has ended, or said why it is about to."""
        self.last_words = self.last_words or _last_words(self)
        return self.last_words is not None or self.popen.poll() is not None

    def end(self) -> str:
        """How a failed child ended."""
        code = self.popen.poll()
        if code is not None and code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        else:
            how = "failed" if code is None else f"ended with exit code {code}"
        words = f": {self.last_words['message']}" if self.last_words is not None else ""
        return f"{self.name} (pid {self.popen.pid}) {how}{words}"


@dataclass
class EngineProcesses:
    """The running children of one engine."""

    ipc: IpcNames
    processes: list[ChildProcess]
    scheduler_info: dict[str, Any] = field(default_factory=dict)

    def check_alive(self) -> str | None:
        """None while all children run, else which one ended first and how.

        A rank that loses another one fails too: whom a signal ended comes first, then who spoke first of those that did
        not lose another. When there is none yet, the one that was lost has ``PEER_GRACE_S`` to end.
        """
        failed = [child for child in self.processes if child.has_failed()]
        if not failed:
            return None

        def order(child: ChildProcess) -> tuple[bool, bool, float]:
            words = child.last_words or _SILENT
            return not child.is_signalled, words["lost_peer"], words["at"]

        first = min(failed, key=order)
        return first.end() if first.is_signalled or _has_cause(first.last_words or _SILENT) else None

    def shutdown(self, grace_s: float = 5.0) -> None:
        """End all children: ask first, insist after ``grace_s`` seconds. Safe to call twice."""
        for child in self.processes:
            if child.popen.poll() is None:
                child.popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for child in self.processes:
            try:
                child.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.popen.kill()
                child.popen.wait()
            for descriptor in (child.ready_fd, child.lifeline_fd):
                if descriptor >= 0:
                    os.close(descriptor)
            child.ready_fd = child.lifeline_fd = -1
        self.ipc.remove()


def _check_devices(num_ranks: int, num_devices: int | None) -> None:
    if num_devices is not None and num_ranks > num_devices:
        raise LaunchError(
            f"{num_ranks} ranks (--tp-size, times --dp-size for replicas) need a device each, and this host shows "
            f"{num_devices}: lower them, or look at CUDA_VISIBLE_DEVICES / HIP_VISIBLE_DEVICES.",
            user_error=True,
        )


def launch_engine_processes(
    server_args: ServerArgs, child_variables: Mapping[str, str] | None = None
) -> EngineProcesses:
    """Start one scheduler a rank, with ``child_variables`` set, and one detokenizer, and wait until all are ready.

    ``server_args`` must be resolved. Raises LaunchError with the child's own words when one fails; the others are
    ended first.
    """
    # Here alone: the detokenizer's process reads this module and must stay without torch.
    from sglang.srt.platforms import current_platform

    variables = {**device_variables(server_args), **(child_variables or {})}
    places = rank_places(server_args)
    _check_devices(len(places), current_platform.device_count())
    engine = EngineProcesses(ipc=IpcNames.create(server_args.dp_size), processes=[])
    threads = max(1, (os.cpu_count() or 1) // len(places))
    init_method = ""
    try:
        for place in places:
            if place.rank == 0 and server_args.tp_size > 1:
                given = server_args.nccl_port
                port = get_free_port() if given is None else given + place.local_rank // server_args.tp_size
                init_method = f"tcp://127.0.0.1:{port}"
            config = LaunchConfig(
                server_args=server_args.to_json(), ipc=engine.ipc, place=place, dist_init_method=init_method
            )
            name = f"scheduler {place.label}".strip()
            engine.processes.append(_start(name, SCHEDULER_MODULE, config, threads, variables))
        config = LaunchConfig(server_args=server_args.to_json(), ipc=engine.ipc)
        engine.processes.append(_start("detokenizer", DETOKENIZER_MODULE, config, 1, {}))
        for child in engine.processes:
            info = _wait_ready(child, engine)
            if child is engine.processes[0]:
                engine.scheduler_info = info
    except BaseException:
        engine.shutdown(grace_s=1.0)
        raise
    return engine


def device_variables(args: ServerArgs) -> dict[str, str]:
    """What must be in the environment of a scheduler process before it touches its device."""
    from sglang.srt.utils.stream_policy import stream_variables  # imports torch, which the detokenizer does without

    try:
        variables = stream_variables(args)
    except EnvError as error:
        raise LaunchError(str(error), user_error=True) from None
    for name, value in variables.items():
        logger.info("%s=%s for the scheduler processes: the streams in use need so many hardware queues", name, value)
    return variables


def _start(name: str, module: str, config: LaunchConfig, threads: int, variables: Mapping[str, str]) -> ChildProcess:
    path = os.path.join(config.ipc.directory, f"{name.replace(' ', '-')}.json")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(config))
    ready_read, ready_write = os.pipe()
    life_read, life_write = os.pipe()
    environment = {**os.environ, **variables}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    command = [sys.executable, "-m", module, "--config", path]
    command += ["--ready-fd", str(ready_write), "--lifeline-fd", str(life_read)]
    # A session of its own: Ctrl-C reaches the parent alone, which then ends its children in order.
    popen = subprocess.Popen(
        command, pass_fds=(ready_write, life_read), env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    os.close(ready_write)
    os.close(life_read)
    return ChildProcess(name=name, popen=popen, ready_fd=ready_read, lifeline_fd=life_write)


def _wait_ready(child: ChildProcess, engine: EngineProcesses) -> dict[str, Any]:
    """The info that ``child`` reports when ready; raises LaunchError when it or a sibling fails first."""
    received = b""
    started = last_word = time.monotonic()
    while True:
        readable, _, _ = select.select([child.ready_fd], [], [], 0.2)
        if readable:
            data = os.read(child.ready_fd, 1 << 16)
            received += data
            if received.endswith(b"\n"):
                break
            if not data:
                code = child.popen.wait()
                raise LaunchError(f"{child.name} ended with exit code {code} before it was ready.", user_error=False)
        if time.monotonic() - last_word > PROGRESS_INTERVAL_S:
            last_word = time.monotonic()
            logger.info("waiting for %s (%.0f s)", child.name, last_word - started)
        _check_siblings(child, engine)
    report = _last_report(received)
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


def _last_words(child: ChildProcess) -> dict[str, Any] | None:
    """The error that an ended child reported, if it did."""
    readable, _, _ = select.select([child.ready_fd], [], [], 0)
    data = os.read(child.ready_fd, 1 << 16) if readable else b""
    report = _last_report(data) if data.endswith(b"\n") else None
    return report if report is not None and report["status"] == "error" else None


def _last_report(lines: bytes) -> dict[str, Any]:
    """What counts of a child's reports: it may fail right after it was ready."""
    report: dict[str, Any] = json.loads(lines.splitlines()[-1])
    return report


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM ends the process by way of its ``finally`` clauses; after it, SIGTERM is ignored.

    Before the block, SIGTERM's default action ends the process at once.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ChildContext:
    """The child's side: its configuration, the readiness report, and an end when the parent is gone."""

    def __init__(self, arguments: Any) -> None:
        with open(arguments.config, "rb") as file:
            self.config = msgspec.json.decode(file.read(), type=LaunchConfig)
        self._ready_fd: int = arguments.ready_fd
        threading.Thread(target=_exit_with_parent, args=(arguments.lifeline_fd,), daemon=True).start()

    def report_ready(self, info: dict[str, Any]) -> None:
        self._report({"status": "ready", "info": info})

    def report_error(self, message: str, user_error: bool, lost_peer: bool = False) -> None:
        """Tell the parent why this process is about to end; ``lost_peer`` when another rank ended before."""
        report = {"status": "error", "message": message[:MAX_WORDS], "user_error": user_error, "lost_peer": lost_peer}
        self._report({**report, "at": time.monotonic()})

    def _report(self, document: dict[str, Any]) -> None:
        os.write(self._ready_fd, (json.dumps(document) + "\n").encode())


def _exit_with_parent(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os._exit(1)


def parse_child_arguments() -> ChildContext:
    """Read ``--config FILE --ready-fd N --lifeline-fd N`` from the command line."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True)
    return ChildContext(parser.parse_args())
