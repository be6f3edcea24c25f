"""The clock of every bench of the engine's steps, and their launches."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

from sglang.srt.platforms import current_platform

T = TypeVar("T")


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """(result of ``action``, seconds from an idle device to an idle device)."""
    current_platform.synchronize()
    started = time.perf_counter()
    result = action()
    current_platform.synchronize()
    return result, time.perf_counter() - started


def launches(action: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, launches, us) of ``action``, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        action()
        current_platform.synchronize()
    table: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            table[event.name][0] += 1
            table[event.name][1] += event.device_time
    rows = [(name, int(count), us) for name, (count, us) in table.items()]
    return sorted(rows, key=lambda row: -row[2])
