"""Shapes, inputs and timing that the Mixture-of-Experts bench and tuner share."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class MoeShape:
    """``experts`` experts of width ``intermediate`` over ``hidden``, ``top_k`` a token."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def bytes_of(self, touched: int, tokens: int, itemsize: int) -> int:
        """What must move: the touched experts' three matrices once, the rows in and out once."""
        return itemsize * (3 * touched * self.hidden * self.intermediate + 2 * tokens * self.hidden)

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.top_k * self.hidden * self.intermediate


SHAPES = {
    "v2lite": MoeShape(64, 2048, 1408, 6),
    "qwen35": MoeShape(256, 2048, 512, 8),
    "v3": MoeShape(256, 7168, 2048, 8),
}
TOKENS = (1, 8, 32, 128, 1024, 8192)


@dataclass
class MoeInputs:
    x: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    # One routing a call, so that replays do not find the last call's experts in the cache.
    weights: list[torch.Tensor]
    ids: list[torch.Tensor]

    @property
    def touched(self) -> float:
        """Experts read by a call, on average over the routings."""
        return statistics.mean(len(ids.unique()) for ids in self.ids)


def make_weights(shape: MoeShape, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2, N(0, 1/sqrt(fan_in))."""
    w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=dtype, device=device)
    w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=dtype, device=device)
    return w13.normal_(std=shape.hidden**-0.5), w2.normal_(std=shape.intermediate**-0.5)


def make_inputs(
    shape: MoeShape, tokens: int, w13: torch.Tensor, w2: torch.Tensor, routings: int, device: str = "cuda"
) -> MoeInputs:
    """Rows N(0, 1) and ``routings`` independent uniform choices of distinct experts."""
    x = torch.randn(tokens, shape.hidden, device=device).to(w13.dtype)
    weights, ids = [], []
    for _ in range(routings):
        chosen = torch.rand(tokens, shape.experts, device=device).topk(shape.top_k, dim=-1)
        weights.append(chosen.values.float().contiguous())
        ids.append(chosen.indices.int().contiguous())
    return MoeInputs(x, w13, w2, weights, ids)


def graph_time(calls: Sequence[Callable[[], object]], runs: int = 5, min_seconds: float = 0.02) -> list[float]:
    """Seconds a call, one figure a run: all ``calls`` captured in one graph, replayed for ``min_seconds`` a run."""
    # The inputs were made on the current stream.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def replay(times: int) -> float:
            start.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        once = max(replay(2) / 2, 1e-6)
        times = max(2, round(min_seconds / once))
        figures = [replay(times) / times / len(calls) for _ in range(runs)]
    del kept
    return figures


def describe_device() -> str:
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
