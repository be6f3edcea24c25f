"""One log format for all processes."""

from __future__ import annotations

import logging


def configure_logging(level: str, prefix: str = "") -> None:
    """Log to stderr as ``[time prefix] message`` at ``level`` ("info", "debug", …)."""
    label = f" {prefix}" if prefix else ""
    logging.basicConfig(
        level=getattr(logging, level.upper()),
        format=f"[%(asctime)s{label}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
