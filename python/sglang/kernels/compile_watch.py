"""Counts Triton kernels that are compiled while requests wait for them."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

logger = logging.getLogger(__name__)

_compiled: Counter[str] = Counter()


def watch_compilations() -> None:
    """From now on count what Triton compiles, and log it once per kernel; without Triton do nothing."""
    try:
        from triton import knobs
    except ImportError:
        return
    knobs.runtime.jit_post_compile_hook = _on_compiled


def compiled_while_serving() -> dict[str, int]:
    """Kernels compiled, or read from Triton's cache, since ``watch_compilations``."""
    return dict(_compiled)


def _on_compiled(*, fn: Any, repr: str, **_: Any) -> None:
    name = fn.name.rpartition(".")[2]
    _compiled[name] += 1
    if _compiled[name] == 1:
        logger.warning("kernel %s was compiled while serving, and requests waited: %s", name, repr)
