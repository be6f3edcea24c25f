"""A child process's side of its launch: its configuration, its reports, and how it ends with its parent."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO

import msgspec

from sglang.srt.managers.ipc import IpcNames
from sglang.srt.managers.pulse import Pulse
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.audit import install_unpickle_counter, log_unpickle_count, reset_unpickle_count

logger = logging.getLogger(__name__)

# Fits into a pipe with any characters, so that a dying child does not wait for a reader.
MAX_WORDS = 8_000
# On this signal a child prints the stacks of its threads.
STACKS_SIGNAL = signal.SIGUSR1


class RankPlace(msgspec.Struct, frozen=True):
    """The place of a scheduler process among the ranks.

    ``rank`` counts the ranks of its replica, ``local_rank`` all ranks of the host (its device), ``dp_rank`` replicas or
    attention groups, whichever there are several of. ``label`` is its name in logs, empty for the only rank.
    """

    rank: int = 0
    local_rank: int = 0
    dp_rank: int = 0
    label: str = ""


class LaunchConfig(msgspec.Struct, kw_only=True):
    """A child's configuration, JSON on its stdin; ``needed``: memory that the launch counted for a scheduler."""

    server_args: ServerArgs
    ipc: IpcNames
    place: RankPlace = RankPlace()
    dist_init_method: str = ""
    needed: dict[str, int] = {}


class _Ordered(BaseException):
    """The parent's order to end."""


def _leave_block() -> None:
    raise _Ordered


class ChildContext:
    """The pipes to the parent: it sends on stdin and receives on ``ready_fd``.

    The first line on stdin is the LaunchConfig. A byte after it is the order to end; the end of stdin means the end of
    the parent.
    """

    def __init__(self, ready_fd: int, pulse_fd: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        orders = os.fdopen(os.dup(0), "rb")
        with open(os.devnull, "rb") as nothing:  # processes that this one starts do not inherit the pipe
            os.dup2(nothing.fileno(), 0)
        line = orders.readline()
        if not line:
            os._exit(1)
        self.config = msgspec.json.decode(line, type=LaunchConfig)
        self.pulse = Pulse(pulse_fd)
        self._ready_fd = ready_fd
        self._is_ordered = False
        # Before the process serves, it has nothing to shut down.
        self._obey: Callable[[], None] = lambda: os._exit(0)
        threading.Thread(target=self._follow_parent, args=(orders,), daemon=True).start()

    def report_error(self, message: str, user_error: bool, lost_peer: bool = False) -> None:
        """Report to the parent why this process is about to end; ``lost_peer`` when another rank ended before."""
        report = {"status": "error", "message": message[:MAX_WORDS], "user_error": user_error, "lost_peer": lost_peer}
        self._report({**report, "at": time.monotonic()})

    def _report(self, document: dict[str, Any]) -> None:
        os.write(self._ready_fd, (json.dumps(document) + "\n").encode())

    def _follow_parent(self, orders: BinaryIO) -> None:
        if orders.read(1):
            self._obey()
        else:
            shutil.rmtree(self.config.ipc.directory, ignore_errors=True)
            os._exit(1)

    @contextmanager
    def serving(self, info: dict[str, Any], end: Callable[[], None] = _leave_block) -> Iterator[None]:
        """Report ready, with ``info``, and serve: what the block unpickles is counted.

        Inside the block the parent's order calls ``end`` in the main thread, which leaves the block where none is
        given; after it, there are no signals.

        SIGTERM, SIGINT and SIGHUP from anyone else are passed on to the parent, which ends all processes in order: a
        supervisor may signal all of them at once.
        """

        def handle(signum: int, _: FrameType | None) -> None:
            if self._is_ordered:
                end()
            else:
                self._report({"status": "asked", "signal": signum})

        def obey() -> None:
            self._is_ordered = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

        _handle_stop_signals(handle)
        self._obey = obey
        try:
            self._report({"status": "ready", "info": info})
            reset_unpickle_count()
            yield
        except _Ordered:
            pass
        finally:
            log_unpickle_count(logger)
            _handle_stop_signals(signal.SIG_IGN)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, handler)


def parse_child_arguments() -> ChildContext:
    """Read ``--ready-fd N --pulse-fd N`` from the command line, and the configuration from stdin."""
    install_unpickle_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--pulse-fd", type=int, required=True)
    arguments = parser.parse_args()
    return ChildContext(arguments.ready_fd, arguments.pulse_fd)
