"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from sglang.srt.platforms.interface import DeviceGraph, Platform, Result


class TorchDeviceGraph:
    """A CUDA or HIP graph of torch; all of them share ``pool``."""

    def __init__(self, pool: tuple[int, int]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, body: Callable[[], Result]) -> Result:
        """Record ``body`` on a stream of its own; it must not synchronise nor read the device."""
        with torch.cuda.graph(self._graph, pool=self._pool):
            return body()

    def replay(self) -> None:
        self._graph.replay()


class CudaPlatform(Platform):
    """Device operations of torch.cuda, which ROCm builds of torch expose under the same names."""

    kind = "cuda"
    device_type = "cuda"
    supports_graphs = True
    supports_streams = True
    _graph_pool: tuple[int, int] | None = None

    @property
    def arch(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def describe(self) -> str:
        return f"{self.kind} ({torch.cuda.get_device_name()}, {self.arch}, torch {torch.__version__})"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        return torch.cuda.mem_get_info(local_rank)

    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def set_device(self, local_rank: int) -> None:
        torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def create_graph(self) -> DeviceGraph:
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        return TorchDeviceGraph(self._graph_pool)

    def create_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream()

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def use_stream(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def timing_event(self) -> torch.cuda.Event | None:
        # Only an external event becomes a node of the graph, which each replay records anew.
        event = torch.cuda.Event(enable_timing=True, external=self.is_capturing())
        event.record()
        return event
