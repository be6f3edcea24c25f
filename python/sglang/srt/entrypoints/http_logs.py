"""Filters for the log lines of the HTTP libraries, which clients could otherwise forge, fill, or repeat."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

# Probes arrive every few seconds; failed ones are logged.
QUIET_PATHS = frozenset({"/health", "/health_generate", "/metrics", "/ping", "/ready"})
_MAX_PATH_CHARS = 256
_MAX_REFUSALS_PER_S = 10

logger = logging.getLogger(__name__)


class AccessFilter(logging.Filter):
    """Drops successful probes and most of many 503s, and cuts long methods and paths; uvicorn escapes them.

    ``quiet_prefixes`` are beginnings of further paths that are probed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quiet_prefixes: tuple[str, ...] = ()
        self._second = 0
        self._num_refused = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return True
        client, method, path, version, status = record.args
        is_quiet = str(path).partition("?")[0] in QUIET_PATHS or str(path).startswith(self.quiet_prefixes)
        if is_quiet and status == 200:
            return False
        if status == 503 and self._is_crowd():
            return False
        record.args = client, _cut(str(method)), _cut(str(path)), version, status
        return True

    def _is_crowd(self) -> bool:
        """Whether the limit of logged 503s per second is reached; admission counts and reports all of them."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._num_refused = now, 0
        self._num_refused += 1
        return self._num_refused > _MAX_REFUSALS_PER_S


class OncePerSecond(logging.Filter):
    """Lets each warning of a library pass once per second, with the number of those held back before it."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.args:
            return True
        key, now = str(record.msg), time.monotonic()
        if now - self._last.get(key, -1.0) < 1.0:
            self._held[key] = self._held.get(key, 0) + 1
            return False
        self._last[key] = now
        if held := self._held.pop(key, 0):
            record.msg = f"{key} ({held} more before this one)"
        return True


_ACCESS_FILTER = AccessFilter()
_ONCE_PER_SECOND = OncePerSecond()


def bound_http_logs(quiet_prefixes: Sequence[str] = ()) -> None:
    """Put the filters on uvicorn's loggers, once its configuration is made; a second call puts none more."""
    _ACCESS_FILTER.quiet_prefixes = tuple(quiet_prefixes)
    logging.getLogger("uvicorn.access").addFilter(_ACCESS_FILTER)
    errors = logging.getLogger("uvicorn.error")
    errors.addFilter(_ONCE_PER_SECOND)
    if errors.getEffectiveLevel() == logging.INFO:
        errors.setLevel(logging.WARNING)  # the server itself says when it listens and when it ends
    logger.addFilter(_ONCE_PER_SECOND)


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio reports every connection that it could not accept, thousands at a time: log it once per second.

    Each of them also leaves a timer that would listen again, and finds the listener closed where the server ends.
    """
    message = context.get("message", "")
    if "socket.accept()" in message:
        logger.warning("No file descriptor is left for a new connection; it waits until other connections close.")
    elif "_start_serving" not in message or not isinstance(context.get("exception"), ValueError):
        loop.default_exception_handler(context)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_PATH_CHARS else f"{text[:_MAX_PATH_CHARS]}... ({len(text)} characters)"
