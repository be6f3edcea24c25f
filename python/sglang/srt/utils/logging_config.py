"""One log format for all processes."""

from __future__ import annotations

import logging
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxdict = 32


def shown(value: Any) -> str:
    """A value that came from a client, for a log line: escaped, and cut to a length that suits a log."""
    return _SHORT.repr(value)


def configure_logging(level: str, process: str) -> None:
    """Log to stderr as ``[time LEVEL process] message`` at ``level`` ("info", "debug", …)."""
    logging.basicConfig(
        level=getattr(logging, level.upper()),
        format=f"[%(asctime)s %(levelname)s {process}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
