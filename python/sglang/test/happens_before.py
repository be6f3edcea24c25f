"""Finds races between streams on the CPU: fake streams with vector clocks, and every storage that torch touches.

Two accesses to one storage, at least one of them a write, must be ordered by waits. Work on the fake streams runs at
once, so what is found does not depend on timing. Lamport 1978 (clocks); Flanagan and Freund 2009 (epochs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from unittest import mock

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.platforms import current_platform
from sglang.srt.platforms.host_device import HostStreamsPlatform, tensors_in
from sglang.srt.utils import multi_stream_utils
from sglang.srt.utils.overlap_check import storage_accesses

Result = TypeVar("Result")
Clock = dict[str, int]


@dataclass(frozen=True)
class Access:
    """One access: the operation, its stream, and the stream's own time."""

    op: str
    stream: str
    time: int
    write: bool

    def __str__(self) -> str:
        return f"{'write' if self.write else 'read'} by {self.op} on {self.stream}"


@dataclass(frozen=True)
class Race:
    """Two accesses without an order; ``reused``: not to one storage, but to memory that the first one's gave back."""

    first: Access
    second: Access
    nbytes: int
    reused: bool = False

    def __str__(self) -> str:
        kind = "memory reuse" if self.reused else "race"
        return f"{kind} on {self.nbytes} bytes: {self.first}, then {self.second}, with no wait between"


@dataclass
class Report(Generic[Result]):
    """What one observed run returned, its races, and the waits that it passed ("side1 after main")."""

    result: Result
    races: list[Race]
    waits: list[str]


class FakeEvent:
    """What had been queued on a stream when it was recorded."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class FakeStream:
    """A stream that runs its work at once and keeps the clock of what it is ordered after."""

    def __init__(self, platform: FakeStreamPlatform, name: str) -> None:
        self.platform = platform
        self.name = name
        self.clock: Clock = {}

    def tick(self) -> int:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]

    def record_event(self) -> FakeEvent:
        return FakeEvent(dict(self.clock))

    def wait_event(self, event: FakeEvent) -> None:
        for name, time in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def wait_stream(self, stream: FakeStream) -> None:
        """Order what is queued here from now on after all that ``stream`` has, unless this wait is left out."""
        if self.platform.passes_wait(f"{self.name} after {stream.name}"):
            self.wait_event(stream.record_event())


class FakeStreamPlatform(HostStreamsPlatform):
    """The CPU with clocked streams, policy of platform ``kind``; ``capturing`` stands for a graph being recorded.

    fakes: vendor packages that are the project's.
    """

    supports_graphs = False

    def __init__(self, kind: str = "cuda", capturing: bool = True, fakes: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.capturing = capturing
        self.fakes = fakes
        self.streams: list[FakeStream] = []
        self._waits: list[str] = []
        self._left_out: int | None = None
        super().__init__()

    def new_stream(self, name: str) -> Any:
        self.streams.append(FakeStream(self, name))
        return self.streams[-1]

    def is_capturing(self) -> bool:
        return self.capturing

    def passes_wait(self, name: str) -> bool:
        self._waits.append(name)
        return len(self._waits) - 1 != self._left_out

    def observe(
        self, body: Callable[[], Result], leave_out: int | None = None, main_first: bool = False
    ) -> Report[Result]:
        """Run ``body`` on the main stream and report on it; ``leave_out``: the index of a wait that is not done.

        main_first: the host queues the main side of each fork before the other.
        """
        for stream in self.streams:
            stream.clock = {}
        self._waits, self._left_out = [], leave_out
        order = mock.patch.object(multi_stream_utils, "_issue", _main_first) if main_first else mock.MagicMock()
        try:
            with order, HappensBefore(self) as checker:
                result = body()
        finally:
            self._left_out = None
        return Report(result, checker.races, list(self._waits))


def _main_first(alt: Any, side: Callable[[], Any], main: Callable[[], Any]) -> tuple[Any, Any]:
    main_result = main()
    with current_platform.use_stream(alt):
        return side(), main_result


@dataclass
class _Memory:
    """The accesses that a new one must be ordered after; ``home``: the stream it was allocated on, if seen."""

    ref: StorageWeakRef
    nbytes: int
    home: str | None
    write: Access | None = None
    reads: dict[str, Access] = field(default_factory=dict)

    def accesses(self) -> list[Access]:
        return [*([self.write] if self.write else []), *self.reads.values()]


class HappensBefore(TorchDispatchMode):
    """Records every storage access inside the block against the current stream's clock.

    Freed memory is treated as the caching allocator may treat it at worst: the next allocation on the same stream gets
    it, so that must be ordered after every access to all that was freed there.
    """

    def __init__(self, platform: FakeStreamPlatform) -> None:
        super().__init__()
        self.races: list[Race] = []
        self._platform = platform
        self._memories: dict[int, _Memory] = {}
        # Stream of allocation -> last access of each stream to what was freed there.
        self._freed: dict[str, dict[str, Access]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._take_back()
        result = func(*args, **(kwargs or {}))
        stream: FakeStream = self._platform.current_stream()
        time = stream.tick()
        arguments = {leaf.untyped_storage()._cdata for leaf in tensors_in((args, kwargs))}
        for storage, written in storage_accesses(func, args, kwargs or {}, result):
            access = Access(str(func), stream.name, time, written)
            memory = self._memories.get(storage._cdata)
            if memory is None:
                is_new = storage._cdata not in arguments
                memory = _Memory(StorageWeakRef(storage), storage.nbytes(), stream.name if is_new else None)
                self._memories[storage._cdata] = memory
                if is_new:
                    self._allocated(memory, access, stream)
            self._touch(memory, access, stream)
        return result

    def _touch(self, memory: _Memory, access: Access, stream: FakeStream) -> None:
        before = memory.accesses() if access.write else [memory.write] if memory.write else []
        for earlier in before:
            if stream.clock.get(earlier.stream, 0) < earlier.time:
                self.races.append(Race(earlier, access, memory.nbytes))
        if access.write:
            memory.write, memory.reads = access, {}
        else:
            memory.reads[access.stream] = access

    def _allocated(self, memory: _Memory, access: Access, stream: FakeStream) -> None:
        for earlier in self._freed.get(stream.name, {}).values():
            if stream.clock.get(earlier.stream, 0) < earlier.time:
                self.races.append(Race(earlier, access, memory.nbytes, reused=True))

    def _take_back(self) -> None:
        for key in [key for key, memory in self._memories.items() if memory.ref.expired()]:
            memory = self._memories.pop(key)
            if memory.home is None:
                continue
            pool = self._freed.setdefault(memory.home, {})
            for access in memory.accesses():
                last = pool.get(access.stream)
                if last is None or last.time < access.time:
                    pool[access.stream] = access
