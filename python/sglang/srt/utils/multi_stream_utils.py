"""Two independent computations of a layer as a fork and a join; all waits between streams are in this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform
from sglang.srt.utils.overlap_check import SideRecord, refuse_conflict
from sglang.srt.utils.overlap_trace import OverlapTrace, merge_rows

Side = TypeVar("Side")
Main = TypeVar("Main")
# How a step computes shared experts: as routed experts, overlapping the routed experts, or before them.
FUSED, OVERLAP, SERIAL = "fused", "overlap", "serial"


@dataclass(frozen=True)
class OverlapSite:
    """Whether one place may overlap, for steps of ``min_tokens`` to ``max_tokens`` (None: no limit), and why.

    capture_only: overlap only while a graph is captured; eager steps stay serial. modes: (most tokens, mode) in
    ascending order, None for no limit: what steps do where there is a choice. Empty: steps overlap.
    """

    name: str
    enabled: bool
    min_tokens: int = 1
    max_tokens: int | None = None
    capture_only: bool = True
    reason: str = ""
    modes: tuple[tuple[int | None, str], ...] = ()

    def mode(self, num_tokens: int) -> str:
        """The mode of a step of ``num_tokens``; a capture and its replays have the same number."""
        return next((mode for most, mode in self.modes if most is None or num_tokens <= most), OVERLAP)

    def fuses(self, num_tokens: int) -> bool:
        return self.mode(num_tokens) == FUSED

    def covers(self, num_tokens: int) -> bool:
        """Whether the site, where enabled, overlaps steps of this size."""
        fits = self.max_tokens is None or num_tokens <= self.max_tokens
        return fits and num_tokens >= max(self.min_tokens, 1) and self.mode(num_tokens) == OVERLAP


UNRESTRICTED = OverlapSite("unrestricted", enabled=True, reason="a stream was given")


class StreamOverlap:
    """One place in a model where a side computation may overlap the main one.

    Without ``alt_stream``, or where ``site`` does not overlap, the same calls run one after the other, the side first.

    The caching allocator needs no ``record_stream`` here:

    - Inputs of both computations stay alive until the join, because the callables hold them.
    - The side's results are allocated on the side stream and read on the forward stream. Once freed, such a block can
      only be used again by the side stream, which first waits for the forward stream at the next fork.
    - The side is queued before the main computation, so that the main computation frees nothing that the side reads.
    """

    def __init__(self, alt_stream: torch.cuda.Stream | None = None, site: OverlapSite = UNRESTRICTED) -> None:
        self.site = site
        self._alt_stream = alt_stream if site.enabled else None
        self._debug = envs.SGLANG_DEBUG_STREAM_OVERLAP.get()
        traced = self._alt_stream is not None and envs.SGLANG_TRACE_OVERLAP.get()
        self.trace = OverlapTrace(site.name) if traced else None

    def covers(self, num_tokens: int) -> bool:
        """Whether a step of ``num_tokens`` rows, captured or not, is one that overlaps where it may."""
        return self._alt_stream is not None and self.site.covers(num_tokens)

    def forks(self, num_tokens: int) -> bool:
        """Whether ``fork_join`` of a step of ``num_tokens`` rows, now, runs the side on its own stream."""
        return self.covers(num_tokens) and (not self.site.capture_only or current_platform.is_capturing())

    def fork_join(self, side: Callable[[], Side], main: Callable[[], Main], num_tokens: int) -> tuple[Side, Main]:
        """Run both for a step of ``num_tokens`` rows and return (side's result, main's result).

        The two may not write what the other touches, share scratch, nor both enter a collective;
        ``SGLANG_DEBUG_STREAM_OVERLAP`` raises OverlapConflictError when they do. What a callable raises is raised after
        the join.
        """
        if not self._debug:
            return self._run(side, main, num_tokens)
        side_record, main_record = SideRecord(), SideRecord()
        results = self._run(side_record.around(side), main_record.around(main), num_tokens)
        refuse_conflict(self.site.name, side_record, main_record)
        return results

    def _run(self, side: Callable[[], Side], main: Callable[[], Main], num_tokens: int) -> tuple[Side, Main]:
        alt = self._alt_stream
        if alt is None or not self.forks(num_tokens):
            return side(), main()
        if self.trace is not None:
            side, main = self.trace.timed(side, main, num_tokens)
        current = current_platform.current_stream()
        alt.wait_stream(current)
        try:
            return _issue(alt, side, main)
        finally:
            current.wait_stream(alt)


def _issue(alt: torch.cuda.Stream, side: Callable[[], Side], main: Callable[[], Main]) -> tuple[Side, Main]:
    """Queue both; the order in which the host does so is not an order between the streams."""
    with current_platform.use_stream(alt):
        side_result = side()
    return side_result, main()


def trace_reader(model: torch.nn.Module) -> Callable[[], list[dict[str, Any]]]:
    """A function for the ``merge_rows`` of ``model``'s traces, which waits for the device if there are any."""
    overlaps = {id(module.overlap): module.overlap for module in model.modules() if hasattr(module, "overlap")}
    traces = [overlap.trace for overlap in overlaps.values() if overlap.trace is not None]
    if not traces:
        return list

    def read() -> list[dict[str, Any]]:
        current_platform.synchronize()
        return merge_rows(traces)

    return read
