"""One log format for all processes."""

from __future__ import annotations

import logging


def configure_logging(level: str, process: str) -> None:
    """Log to stderr as ``[time LEVEL process] message`` at ``level`` ("info", "debug", …)."""
    logging.basicConfig(
        level=getattr(logging, level.upper()),
        format=f"[%(asctime)s %(levelname)s {process}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
