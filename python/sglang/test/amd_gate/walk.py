"""A platform whose tensors have only shapes, and a record of what each op chose and launched in a model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang.kernels.impl import Impl, OpSpec
from sglang.kernels.registry import REGISTRY
from sglang.srt.platforms import Platform
from sglang.srt.platforms.interface import DeviceGraph, Result
from sglang.test.amd_gate.driver import CompileOnlyDriver, Launch

# Bytes of an MI300X and of an MI355X: the sizes of pools decide how kernels address them.
MEMORY_BYTES = {"gfx942": 192 << 30, "gfx950": 288 << 30}


class ShapeOnlyGraph:
    """Runs the body at capture; a replay does nothing."""

    def capture(self, body: Callable[[], Result]) -> Result:
        return body()

    def replay(self) -> None:
        return None


class ShapeOnlyPlatform(Platform):
    """A HIP platform of ``arch`` whose tensors have no storage: dispatch chooses as on the machine."""

    kind = "hip"
    device_type = "cuda"
    supports_graphs = True

    def __init__(self, arch: str) -> None:
        self._arch = arch

    @property
    def arch(self) -> str:
        return self._arch

    def describe(self) -> str:
        return f"{self._arch}, shapes only"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        return MEMORY_BYTES[self._arch], MEMORY_BYTES[self._arch]

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")

    def set_device(self, local_rank: int) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def create_graph(self) -> DeviceGraph:
        return ShapeOnlyGraph()


@dataclass(frozen=True)
class WalkStep:
    """One step of one model; ``error`` is why it failed, "" if it ran."""

    model: str
    step: str
    error: str = ""


def describe_error(error: Exception) -> str:
    """One line: its type, the innermost line of the product in its traceback, and the end of its message."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sglang/" in frame.filename]
    frames = [frame for frame in frames if not frame.filename.endswith(("shape_walk.py", "amd_gate/walk.py"))]
    place = f" at sglang/{frames[-1].filename.rpartition('/sglang/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[-300:]}"


Walk = Callable[[], Iterator[WalkStep]]


@dataclass(frozen=True)
class OpCall:
    """One call of an op: the shape of its first tensor and what it launched.

    reference: the torch reference ran. alone: the op has no other implementation.
    """

    op: str
    shape: str
    launches: tuple[Launch, ...]
    reference: bool
    alone: bool


@contextmanager
def watched_ops(driver: CompileOnlyDriver) -> Iterator[list[OpCall]]:
    """Inside the block each call of a decided op is added to the list, and a kernel that fails raises."""
    calls: list[OpCall] = []
    serving, REGISTRY.serving = REGISTRY.serving, True
    for op in REGISTRY.ops.values():
        op.set_table(tuple(replace(impl, fn=_watched(op, impl, driver, calls)) for impl in op.table or ()))
    try:
        yield calls
    finally:
        REGISTRY.serving = serving
        for op in REGISTRY.ops.values():
            op.set_table(None)


def _watched(op: OpSpec, impl: Impl, driver: CompileOnlyDriver, calls: list[OpCall]) -> Callable[..., Any]:
    reference, alone = impl.name == op.impls[-1].name, len(op.impls) == 1

    def run(*args: Any, **kwargs: Any) -> Any:
        before = len(driver.launches)
        result = impl.fn(*args, **kwargs)
        calls.append(OpCall(op.name, _shape(args), tuple(driver.launches[before:]), reference, alone))
        return result

    return run


def _shape(args: tuple[Any, ...]) -> str:
    """ "128x7168", followed by " fp8" if an argument has eight bits."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    dims = "x".join(str(size) for size in tensors[0].shape) if tensors else "no tensor"
    return dims + (" fp8" if any(t.is_floating_point() and t.dtype.itemsize == 1 for t in tensors) else "")
