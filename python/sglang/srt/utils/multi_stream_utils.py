"""Two independent computations of a layer as a fork and a join; every wait between streams stands here."""

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
# What a step makes of shared experts: routed ones, work beside the routed ones, or work before them.
FUSED, OVERLAP, SERIAL = "fused", "overlap", "serial"


@dataclass(frozen=True)
class OverlapSite:
    """Whether one place may overlap, for steps of ``min_tokens`` to ``max_tokens`` (None: no limit), and why.

    capture_only: only while a graph is recorded; eager steps stay serial. modes: (most tokens, mode) ascending, None
    without limit: what steps do where there is a choice; overlap where there is none.
    """

    name: str
    enabled: bool
    min_tokens: int = 1
    max_tokens: int | None = None
    capture_only: bool = True
    reason: str = ""
    modes: tuple[tuple[int | None, str], ...] = ()

    def mode(self, num_tokens: int) -> str:
        """What ``modes`` says of a step of so many tokens, which capture and replay know alike."""
        return next((mode for most, mode in self.modes if most is None or num_tokens <= most), OVERLAP)

    def fuses(self, num_tokens: int) -> bool:
        return self.mode(num_tokens) == FUSED

    def covers(self, num_tokens: int) -> bool:
        """True for a step of a size that the site overlaps where it is enabled."""
        fits = self.max_tokens is None or num_tokens <= self.max_tokens
        return fits and num_tokens >= max(self.min_tokens, 1) and self.mode(num_tokens) == OVERLAP


UNPLANNED = OverlapSite("unplanned", enabled=True, reason="a stream was given")


class StreamOverlap:
    """One place in a model where a side computation may run beside the main one.

    Without ``alt_stream``, or where ``site`` says no, both run one after the other by the same calls, the side first.

    The caching allocator needs no ``record_stream`` here. What the callables captured is alive until the join. A block
    of the side stream that main work has read goes back to the side stream alone, whose next use begins with a wait for
    the forking stream; that is always the forward stream, and the side is queued before main work can free more.
    """

    def __init__(self, alt_stream: torch.cuda.Stream | None = None, site: OverlapSite = UNPLANNED) -> None:
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
    """A function that reads what ``SGLANG_TRACE_OVERLAP`` measured in the modules of ``model`` (attribute ``overlap``).

    It returns the rows of ``merge_rows`` and waits for the device; with no trace, it returns nothing at once.
    """
    overlaps = {id(module.overlap): module.overlap for module in model.modules() if hasattr(module, "overlap")}
    traces = [overlap.trace for overlap in overlaps.values() if overlap.trace is not None]
    if not traces:
        return list

    def read() -> list[dict[str, Any]]:
        current_platform.synchronize()
        return merge_rows(traces)

    return read
