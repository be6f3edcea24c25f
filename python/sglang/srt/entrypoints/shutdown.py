"""The shutdown of a server: the meaning of each signal, the time for requests in flight, and the exit status."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils.limits import DRAIN_INTERRUPT_S, DRAIN_WRITE_S

logger = logging.getLogger(__name__)

# The server was shut down in order, but requests in flight ended with an error.
EXIT_CUT = 4
_POLL_S = 0.02

SignalHandler = Callable[[int, "FrameType | None"], None]


def handle_stop_signals(handler: SignalHandler | signal.Handlers) -> None:
    """Let ``handler`` have SIGINT, SIGTERM and SIGHUP; a SIGHUP that is ignored (nohup) stays so. Main thread only."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def exit_during_start(signum: int, _: FrameType | None) -> NoReturn:
    """A stop signal before the server serves: end by way of the ``finally`` clauses, once."""
    handle_stop_signals(signal.SIG_IGN)
    sys.exit(128 + signum)


class Drain:
    """The shutdown of a server: no new requests, and a deadline for those in flight.

    SIGTERM and SIGHUP give them ``timeout_s`` seconds, SIGINT ``DRAIN_INTERRUPT_S`` if that is less, and SIGINT to a
    server that already stops none. A signal never extends the deadline.
    """

    def __init__(self, manager: TokenizerManager, timeout_s: float) -> None:
        self._manager = manager
        self._timeout_s = timeout_s
        self._deadline = math.inf

    @property
    def is_asked(self) -> bool:
        return self._deadline < math.inf

    def ask(self, signum: int, _: FrameType | None = None) -> None:
        """Handle a signal; safe to call in a signal handler."""
        seconds = self._timeout_s
        if signum == signal.SIGINT:
            seconds = 0.0 if self.is_asked else min(seconds, DRAIN_INTERRUPT_S)
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    async def run(self, num_active: Callable[[], int]) -> bool:
        """Wait until ``num_active`` HTTP requests are none; True if all could finish before the deadline."""
        self._manager.stop_admission()
        logger.info("Shutting down: %d requests in flight have %.1f s to finish.", num_active(), self._left_s())
        while num_active() and self._left_s() > 0:
            await asyncio.sleep(_POLL_S)
        num_cut = num_active()
        if num_cut:
            logger.warning("Shutting down: %d requests were not finished.", num_cut)
            self._manager.fail(self._manager.shutdown_error("the request was ended before it had finished"))
            written_by = time.monotonic() + DRAIN_WRITE_S
            while num_active() and time.monotonic() < written_by:
                await asyncio.sleep(_POLL_S)
        return num_cut == 0

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())
