"""What benches say of a machine, and of what its device ran."""

import os
import platform
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata

import numpy as np
import torch

from sglang.srt.platforms import current_platform
from sglang.version import __version__


def device_seconds(action: Callable[[], object], times: int) -> float:
    """Seconds per call of ``times`` calls in a row, by events on the current stream; needs a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


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


def describe_machine() -> str:
    """One line on the CPU and the versions that a figure was taken with."""
    return (
        f"device: cpu, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; sglang-amd {__version__}, python "
        f"{platform.python_version()}, torch {metadata.version('torch')}, numpy {np.__version__}"
    )
