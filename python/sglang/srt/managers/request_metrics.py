"""Latencies of requests, measured in the process that sends the replies."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

from sglang.srt.managers.io_struct import StrOutput

# Bounds in seconds from one millisecond, three per power of ten.
_BOUNDS = tuple(float(f"{step}e{power}") for power in range(-3, 3) for step in (1, 2.5, 5))


class Histogram:
    """Counts of values by upper bound, inclusive, and their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(_BOUNDS, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, int]]:
        """Bounds as text, the last one infinite, and the number of values at or below each."""
        return list(zip([*map(str, _BOUNDS), "+Inf"], accumulate(self._counts), strict=True))


@dataclass
class RequestMetrics:
    """Latencies of the requests of one scheduler. All times begin when the prompt is tokenized.

    Requests that are aborted have no end-to-end time.
    """

    num_requests: int = 0
    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    end_to_end: Histogram = field(default_factory=Histogram)


class RequestTimer:
    """Measures one request, for the metrics of the scheduler that it was sent to."""

    def __init__(self, metrics: RequestMetrics, created: float) -> None:
        self._metrics = metrics
        self._created = created
        self._last: float | None = None

    def started(self, at: float | None) -> None:
        """Record that a scheduler took it from its queue, now or at the time given."""
        self._metrics.queue.add((at or time.perf_counter()) - self._created)

    def received(self, output: StrOutput) -> None:
        """Record tokens, which arrive one after the other or, without a stream, all at once, and the end."""
        now, num_new = time.perf_counter(), len(output.output_ids)
        if num_new and self._last is None:
            # With only one token, the whole time counts.
            self._last = now if num_new == 1 else output.first_token_at or now
            self._metrics.first_token.add(self._last - self._created)
            num_new -= 1
        if num_new and self._last is not None:
            self._metrics.inter_token.add((now - self._last) / num_new, num_new)
            self._last = now
        if output.finish_reason is not None:
            self._metrics.num_requests += 1
            if output.finish_reason.type != "abort":
                self._metrics.end_to_end.add(now - self._created)
