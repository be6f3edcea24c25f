"""Streams and graphs on the host, so that code that needs them runs, and is tested, without a GPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.platforms.interface import DeviceGraph, Params, PlatformError, Result, Returned

COLLECTIVES = ("c10d", "_c10d_functional")
# A replay allocates nothing, so uninitialised memory keeps its old contents.
_ALLOCATIONS = frozenset(
    ("empty.memory_format", "empty_like.default", "empty_strided.default", "new_empty.default",
     "new_empty_strided.default")
)  # fmt: skip


class HostStream:
    """A stream whose work is complete when the call that queues it returns, so that every wait returns at once."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, stream: HostStream) -> None:
        """Does nothing: the work of ``stream`` is complete."""

    def synchronize(self) -> None:
        """Does nothing: all work is complete."""


@dataclass(frozen=True)
class _Call:
    """One recorded call; ``results`` are its tensors with memory of their own, None for views of arguments."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[torch.Tensor | None, ...]

    def run(self) -> None:
        again = self.fn(*self.args, **self.kwargs)
        for fixed, fresh in zip(self.results, tensors_in(again), strict=True):
            if fixed is None:
                continue
            if fresh.shape != fixed.shape or fresh.dtype != fixed.dtype:
                raise PlatformError(
                    f"replay of {self.name} gave {fresh.dtype} {tuple(fresh.shape)}, where {fixed.dtype} "
                    f"{tuple(fixed.shape)} was recorded: its shape depends on data, which no graph can replay"
                )
            if fresh.data_ptr() != fixed.data_ptr():
                fixed.copy_(fresh)
        _finish(again)


class HostGraph:
    """Runs a step once, and each replay repeats the recorded calls on the storages of that run.

    A call is one operation of torch, or one kernel (``kernel``); as on a device, a replay reads its arguments again.
    Numbers and branches of the host are those of the capture, as in a graph of a device.
    """

    def __init__(self, platform: HostStreamsPlatform) -> None:
        self._platform = platform
        self._calls: list[_Call] = []

    def capture(self, body: Callable[[], Result]) -> Result:
        """Run and record ``body``, on a stream of its own; what it returns is overwritten by each replay."""
        with self._platform.recording(self._calls):
            return body()

    @torch.inference_mode()
    def replay(self) -> None:
        """Repeat the calls. Raises PlatformError when one gives a tensor of another shape than it did."""
        for call in self._calls:
            call.run()


class _Recorder(TorchDispatchMode):
    """Appends each call to ``calls``; the operations inside a kernel belong to its call."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls
        self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._in_kernel and func.name().removeprefix("aten::") not in _ALLOCATIONS:
            acts = func._schema.is_mutable or func.namespace in COLLECTIVES
            self._record(str(func), func, args, kwargs, result, acts)
        return result

    def kernel(self, fn: Callable[..., Returned], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Returned:
        """Run ``fn`` as one call; inside another kernel it belongs to that call."""
        if self._in_kernel:
            return fn(*args, **kwargs)
        self._in_kernel = True
        try:
            result = fn(*args, **kwargs)
        finally:
            self._in_kernel = False
        self._record(getattr(fn, "__name__", repr(fn)), fn, args, kwargs, result, True)
        return result

    def _record(self, name: str, fn: Any, args: Any, kwargs: dict[str, Any], result: Any, acts: bool) -> None:
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        found = tensors_in(result)
        own = tuple(None if tensor.untyped_storage()._cdata in given else tensor for tensor in found)
        if acts or any(tensor is not None for tensor in own):
            self._calls.append(_Call(name, fn, args, kwargs, own))


# Ranks may be threads of one process, each with a stack of streams and a graph of its own.
_active = threading.local()


def _recorder() -> _Recorder | None:
    """The recorder of the graph that this thread captures now, if any."""
    return getattr(_active, "recorder", None)


def kernel(fn: Callable[Params, Returned]) -> Callable[Params, Returned]:
    """``fn`` as a host graph records it: one call, whose host-side decisions are made again at each replay."""

    @functools.wraps(fn)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Returned:
        recorder = _recorder()
        return fn(*args, **kwargs) if recorder is None else recorder.kernel(fn, args, kwargs)

    return run


class HostStreamsPlatform(CpuPlatform):
    """The CPU with streams that run in order, and graphs that repeat what was recorded."""

    supports_streams = True
    supports_graphs = True

    def __init__(self) -> None:
        self.main: Any = self.new_stream("main")
        self._threads = threading.local()
        self._num_sides = 0

    def new_stream(self, name: str) -> Any:
        return HostStream(name)

    def create_stream(self) -> Any:
        self._num_sides += 1
        return self.new_stream(f"side{self._num_sides}")

    def current_stream(self) -> Any:
        return getattr(self._threads, "stream", self.main)

    @contextmanager
    def use_stream(self, stream: Any) -> Iterator[None]:
        before, self._threads.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._threads.stream = before

    def is_default_stream(self) -> bool:
        return self.current_stream() is self.main

    def is_capturing(self) -> bool:
        return _recorder() is not None

    def create_graph(self) -> DeviceGraph:
        return HostGraph(self)

    def kernel(self, fn: Callable[Params, Returned]) -> Callable[Params, Returned]:
        return kernel(fn)

    @contextmanager
    def recording(self, calls: list[_Call]) -> Iterator[None]:
        """Append what runs inside the block to ``calls``."""
        if _recorder() is not None:
            raise PlatformError("a graph is captured while another one is")
        with self.use_stream(self.new_stream("capture")), _Recorder(calls) as _active.recorder:
            try:
                yield
            finally:
                _active.recorder = None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested arguments or results."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _finish(result: Any) -> None:
    """Wait for a collective: its handle is one of its results."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.ScriptObject):
            leaf.wait()
