"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from sglang.srt.platforms.interface import DeviceGraph, Platform, Result


class GraphPool:
    """The memory that captured graphs share. It is freed with the last of them and cannot be reused."""

    def __init__(self) -> None:
        self._handle: tuple[int, int] | None = None
        self._captured: weakref.WeakSet[TorchDeviceGraph] = weakref.WeakSet()

    def handle(self) -> tuple[int, int]:
        """The pool for the next capture."""
        if self._handle is None or not self._captured:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def keep(self, graph: TorchDeviceGraph) -> None:
        """Record that ``graph`` was captured into the pool, which lives as long as the graph."""
        self._captured.add(graph)


class TorchDeviceGraph:
    """A CUDA or HIP graph of torch; all of them share ``pool``."""

    def __init__(self, pool: GraphPool) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, body: Callable[[], Result]) -> Result:
        """Record ``body`` on a stream of its own; it must not synchronise nor read the device."""
        with torch.cuda.graph(self._graph, pool=self._pool.handle()):
            result = body()
        self._pool.keep(self)
        return result

    def replay(self) -> None:
        self._graph.replay()


class CudaPlatform(Platform):
    """Device operations of torch.cuda, which ROCm builds of torch expose under the same names."""

    kind = "cuda"
    device_type = "cuda"
    supports_graphs = True
    supports_streams = True

    def __init__(self) -> None:
        self._graph_pool = GraphPool()

    @property
    def arch(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def describe(self) -> str:
        return f"{self.kind} ({torch.cuda.get_device_name()}, {self.arch}, torch {torch.__version__})"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        # Memory that torch caches, gigabytes after loading, is free too; the first capture would release it.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(local_rank)

    def device_count(self) -> int | None:
        return torch.cuda.device_count()

    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def set_device(self, local_rank: int) -> None:
        torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def create_graph(self) -> DeviceGraph:
        return TorchDeviceGraph(self._graph_pool)

    def create_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream()

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def use_stream(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def is_default_stream(self) -> bool:
        return bool(torch.cuda.current_stream() == torch.cuda.default_stream())

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def timing_event(self) -> torch.cuda.Event | None:
        # Only an external event becomes a node of the graph, which each replay records again.
        event = torch.cuda.Event(enable_timing=True, external=self.is_capturing())
        event.record()
        return event
