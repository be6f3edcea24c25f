"""The clock of every bench of the engine's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sglang.srt.platforms import current_platform

T = TypeVar("T")


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """(result of ``action``, seconds from an idle device to an idle device)."""
    current_platform.synchronize()
    started = time.perf_counter()
    result = action()
    current_platform.synchronize()
    return result, time.perf_counter() - started
