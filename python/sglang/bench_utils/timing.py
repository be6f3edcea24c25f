"""The two clocks of every bench of the engine's steps: the host's, and that of the device's stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from sglang.srt.platforms import current_platform

T = TypeVar("T")


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What ``action`` returns, and its seconds from an idle device to an idle device."""
    current_platform.synchronize()
    started = time.perf_counter()
    result = action()
    current_platform.synchronize()
    return result, time.perf_counter() - started


def device_seconds(action: Callable[[], object], times: int) -> float:
    """Seconds per call of ``times`` calls in a row, by events on the current stream; needs a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times
