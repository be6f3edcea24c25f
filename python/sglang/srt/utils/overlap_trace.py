"""How much of a side computation overlapped the main one, measured with events (``SGLANG_TRACE_OVERLAP``)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)

Side = TypeVar("Side")
Main = TypeVar("Main")
Key = TypeVar("Key")
# Number of forks, then microseconds of the side, of the main computation, and of both at once, summed.
Sums = tuple[float, ...]
# Most eager forks that are kept until they are read; older ones are dropped.
MAX_PENDING = 1024


@dataclass
class ForkTiming:
    """Events of one fork: one before it, and begin and end of both computations."""

    num_tokens: int
    fork: torch.cuda.Event
    side: list[torch.cuda.Event]
    main: list[torch.cuda.Event]

    def times_us(self) -> tuple[float, float, float] | None:
        """Microseconds of side, main, and of both at once; None if the fork has not run since it was recorded."""
        if len(self.side) != 2 or len(self.main) != 2:
            return None
        try:
            begin, end = (self.fork.elapsed_time(event) * 1e3 for event in self.side)
            main_begin, main_end = (self.fork.elapsed_time(event) * 1e3 for event in self.main)
        except (RuntimeError, ValueError):  # captured, and never replayed
            return None
        return end - begin, main_end - main_begin, max(0.0, min(end, main_end) - max(begin, main_begin))


class OverlapTrace:
    """Fork timings of one site; those of captured graphs are kept, eager ones until they are summed."""

    def __init__(self, site: str) -> None:
        self.site = site
        self._captured: list[ForkTiming] = []
        self._eager: deque[ForkTiming] = deque(maxlen=MAX_PENDING)
        self._eager_sums: dict[int, Sums] = {}
        self._said = False

    def timed(
        self, side: Callable[[], Side], main: Callable[[], Main], num_tokens: int
    ) -> tuple[Callable[[], Side], Callable[[], Main]]:
        """``side`` and ``main`` between events where they can be recorded; call it before the fork."""
        fork = current_platform.timing_event()
        if fork is None:
            if not self._said:
                self._said = True
                logger.warning(
                    "SGLANG_TRACE_OVERLAP: %s is not measured in captured graphs, because this torch version records "
                    "no timing events there; use --disable-cuda-graph to measure it in eager steps",
                    self.site,
                )
            return side, main
        timing = ForkTiming(num_tokens, fork, [], [])
        (self._captured if current_platform.is_capturing() else self._eager).append(timing)
        return _between_events(side, timing.side), _between_events(main, timing.main)

    def sums(self) -> dict[tuple[int, bool], Sums]:
        """Sums by (tokens, captured): last replay of graphs, all eager steps so far; the device must be idle."""
        found: dict[tuple[int, bool], Sums] = {}
        for timing in self._captured:
            _add(found, (timing.num_tokens, True), timing.times_us())
        while self._eager:
            timing = self._eager.popleft()
            # Prefill steps have any size; rounding to powers of two keeps the table short.
            _add(self._eager_sums, 1 << (timing.num_tokens - 1).bit_length(), timing.times_us())
        return found | {(size, False): sums for size, sums in self._eager_sums.items()}


def _between_events(body: Callable[[], Side], events: list[torch.cuda.Event]) -> Callable[[], Side]:
    def timed() -> Side:
        _record(events)
        result = body()
        _record(events)
        return result

    return timed


def _record(events: list[torch.cuda.Event]) -> None:
    event = current_platform.timing_event()
    if event is not None:
        events.append(event)


def _add(table: dict[Key, Sums], key: Key, more: Iterable[float] | None, forks: int = 1) -> None:
    if more is not None:
        table[key] = tuple(a + b for a, b in zip(table.get(key, (0.0,) * 4), (forks, *more), strict=True))


def merge_rows(traces: Iterable[OverlapTrace]) -> list[dict[str, Any]]:
    """One row for each site, step size (eager: rounded up to a power of two) and kind of step.

    Keys: site, num_tokens, captured, forks, side_us, main_us (means), overlap_fraction (fraction of the side's time
    during which the main computation ran too, 0 to 1; also under its former name beside_share).

    The device must be idle.
    """
    table: dict[tuple[str, int, bool], Sums] = {}
    for trace in traces:
        for (num_tokens, captured), (forks, *times) in trace.sums().items():
            _add(table, (trace.site, num_tokens, captured), times, int(forks))
    return [
        {
            "site": site,
            "num_tokens": num_tokens,
            "captured": captured,
            "forks": int(forks),
            "side_us": round(side / forks, 1),
            "main_us": round(main / forks, 1),
            "overlap_fraction": (fraction := round(both / side, 3) if side else 0.0),
            "beside_share": fraction,
        }
        for (site, num_tokens, captured), (forks, side, main, both) in sorted(table.items())
    ]
