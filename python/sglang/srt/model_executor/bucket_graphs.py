"""Work over persistent tensors, captured once per batch bucket, together with the other ranks."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.model_executor.capture_lint import CaptureViolation, capture_lint, collect_violations
from sglang.srt.platforms.interface import DeviceGraph

logger = logging.getLogger(__name__)


class GraphOutput(Protocol):
    """The output of a captured step."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors that a replay must reproduce bit by bit."""


OfRequests = TypeVar("OfRequests", bound="RequestTensors")


@dataclass(frozen=True)
class RequestTensors:
    """An output whose fields are tensors with a row per request."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the result."""
        return tuple(vars(self).values())

    def first(self: OfRequests, size: int) -> OfRequests:
        """The result of the first ``size`` requests."""
        return type(self)(*(tensor[:size] for tensor in self.tensors()))


Output = TypeVar("Output", bound=GraphOutput)
# Runs the work of one bucket on the current contents of its tensors.
Body = Callable[[], Output]


@dataclass(frozen=True)
class CapturedStep(Generic[Output]):
    """One bucket: its graph, and the output that each replay overwrites.

    The graph reads what ``body`` holds, at the same addresses, so that lives as long as the graph.
    """

    graph: DeviceGraph
    output: Output
    body: Body[Output]


class BucketGraphs(Generic[Output]):
    """Captures and replays ``name`` for batches of up to each of ``buckets`` requests (``unit``), ascending.

    A bucket that cannot be captured, or whose check fails, is refused on all ranks of ``world``, and runs eagerly.
    """

    unit = "batch size"

    def __init__(
        self, name: str, buckets: Sequence[int], device: torch.device, world: ProcessGroupHandle | None = None
    ) -> None:
        self.name = name
        self.buckets = list(buckets)
        self.refused: dict[int, str] = {}
        self._device = device
        self._world = world or ProcessGroupHandle()
        self._steps: dict[int, CapturedStep[Output]] = {}

    def capture_all(self, body_of: Callable[[int], Body[Output]], create_graph: Callable[[], DeviceGraph]) -> None:
        """Capture all buckets, largest first so that others fit its memory."""
        started = time.perf_counter()
        name, count = f"Capturing {self.name} graphs", len(self.buckets)
        with tqdm(reversed(self.buckets), name, count, unit="graph", disable=None) as bar:  # None: not in log files
            for bucket in bar:
                bar.set_postfix({self.unit: bucket})
                body = body_of(bucket)
                # Ranks capture at the same time, because collectives may open connections then.
                if self.agree(bucket, self._violation(body)):
                    self.agree(bucket, self._record(bucket, body, create_graph()))
        logger.info("captured %d %s graphs in %.1f s", len(self._steps), self.name, time.perf_counter() - started)

    def _violation(self, body: Body[Output]) -> str:
        """Run the step twice, and return what it does that no graph can replay, or ""."""
        try:
            with collect_violations():
                body()  # lazy compilation and workspaces must be done before capture
                with capture_lint(self._device):
                    body()
        except CaptureViolation as violation:
            return str(violation)
        return ""

    def _record(self, bucket: int, body: Body[Output], graph: DeviceGraph) -> str:
        """Capture the step, and return why that is refused, or "". Other errors raise after the ranks have agreed."""
        try:
            with capture_lint(self._device):
                self._steps[bucket] = CapturedStep(graph, graph.capture(body), body)
        except CaptureViolation as violation:
            return str(violation)
        except Exception as error:
            self.agree(bucket, f"{type(error).__name__}: {error}")
            raise
        return ""

    def agree(self, bucket: int, reason: str) -> bool:
        """Refuse ``bucket`` on all ranks if one has a ``reason``; True if none has. Waits for all ranks."""
        for rank, theirs in enumerate(self._world.all_gather_text(reason)):
            if theirs:
                self._refuse(bucket, theirs if rank == self._world.rank else f"rank {rank} refuses it: {theirs}")
                return False
        return True

    def _refuse(self, bucket: int, reason: str) -> None:
        """Never replay ``bucket`` again; its batches run eagerly."""
        self.refused[bucket] = reason
        self._steps.pop(bucket, None)
        logger.warning("%s graph of %s %d is refused: %s", self.name, self.unit, bucket, reason)

    def bucket_of(self, size: int) -> int | None:
        """The bucket for so many requests, or tokens; None when they must run eagerly."""
        if not 0 < size <= self.buckets[-1]:
            return None
        bucket = self.buckets[bisect_left(self.buckets, size)]
        return bucket if bucket in self._steps else None

    @property
    def captured(self) -> list[int]:
        """The buckets that are replayed, ascending."""
        return sorted(self._steps)

    def run(self, bucket: int) -> Output:
        """Replay ``bucket`` on the current contents of its tensors; the output is valid until the next replay."""
        step = self._steps[bucket]
        step.graph.replay()
        return step.output

    def output(self, bucket: int) -> Output:
        """The output of the last replay of ``bucket``, in the tensors that each replay overwrites."""
        return self._steps[bucket].output

    def describe(self) -> dict[str, Any]:
        """Sizes that are replayed, and why others are not; msgpack-able."""
        refused = {str(bucket): reason for bucket, reason in sorted(self.refused.items())}
        return {"captured": self.captured, "refused": refused}
