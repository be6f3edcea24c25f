"""Counts unpickling in this process, so that "nothing is unpickled while serving" is a number and not a promise."""

from __future__ import annotations

import logging
import sys
from typing import Any

_count = 0
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _count
    if event == "pickle.find_class":
        _count += 1


def install_unpickle_counter() -> None:
    """Start counting; audit hooks cannot be removed, so a second call does nothing."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


def reset_unpickle_count() -> None:
    """Forget what start-up unpickled (called when the process is ready)."""
    global _count
    _count = 0


def unpickle_count() -> int:
    """Classes looked up by any unpickler since the last reset."""
    return _count


def log_unpickle_count(logger: logging.Logger) -> None:
    """The count as a log line, when the process ends."""
    level = logging.WARNING if _count else logging.DEBUG
    logger.log(level, "classes unpickled while serving: %d", _count)
