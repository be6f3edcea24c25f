"""The clock of a device's stream, for benches of kernels."""

from collections.abc import Callable

import torch


def device_seconds(action: Callable[[], object], times: int) -> float:
    """Seconds per call of ``times`` calls in a row, by events on the current stream; needs a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times
