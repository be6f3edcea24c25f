"""What the engine needs from the machine it runs on: kind, architecture, memory, streams, graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, Protocol, TypeVar

import torch


class PlatformError(RuntimeError):
    """The requested platform is not available on this machine."""


Result = TypeVar("Result")
Params = ParamSpec("Params")
Returned = TypeVar("Returned")


class DeviceGraph(Protocol):
    """A recorded sequence of device work that runs again on the same memory."""

    def capture(self, body: Callable[[], Result]) -> Result:
        """Record ``body``; what it returns is overwritten by each replay."""
        ...

    def replay(self) -> None: ...


class Platform(ABC):
    """One hardware platform.

    ``kind`` decides policy ("cpu", "cuda", "hip"); ``device_type`` is where tensors live, which differs only when
    ROCm paths run over fakes on a machine without a GPU.
    """

    kind: str
    device_type: str
    supports_graphs: bool = False
    supports_streams: bool = False
    # The variable that bounds the hardware queues of a process, and its default; None if there is no such bound.
    queue_variable: tuple[str, int] | None = None
    # Vendor packages replaced by the project's fakes; start-up and /server_info show them.
    fakes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def arch(self) -> str:
        """Architecture name: "cpu", "sm_90", "gfx942", …"""

    @abstractmethod
    def describe(self) -> str:
        """One line for logs and /server_info."""

    def device_count(self) -> int | None:
        """Number of devices, of which each rank uses one; None if ranks share one."""
        return None

    @abstractmethod
    def memory_info(self, local_rank: int) -> tuple[int, int]:
        """Free and total bytes of the memory that pools live in; only for start-up, as it may wait for the device."""

    def device(self, local_rank: int) -> torch.device:
        """The device that tensors of this rank live on."""
        return torch.device(self.device_type)

    @abstractmethod
    def set_device(self, local_rank: int) -> None:
        """Make ``device(local_rank)`` the current device of this process."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def create_stream(self) -> torch.cuda.Stream | None:
        """A new side stream; None if work is serial."""
        return None

    def current_stream(self) -> torch.cuda.Stream:
        """The stream on which work is queued. Needs ``supports_streams``, as the next three do."""
        raise PlatformError(f"platform {self.kind} on {self.device_type} has no streams")

    def use_stream(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """Queue work on ``stream`` inside the block."""
        raise PlatformError(f"platform {self.kind} on {self.device_type} has no streams")

    def is_default_stream(self) -> bool:
        """Whether work is queued on the default stream, which a library uses if it is given none."""
        return True

    def is_capturing(self) -> bool:
        """True while work is recorded into a graph and not run."""
        return False

    def timing_event(self) -> torch.cuda.Event | None:
        """A timed event just recorded, under capture after each replay; None if none can be recorded."""
        return None

    def create_graph(self) -> DeviceGraph:
        """An empty graph; all graphs of a process share one memory pool. Needs ``supports_graphs``."""
        raise PlatformError(f"platform {self.kind} on {self.device_type} does not capture graphs")

    def kernel(self, fn: Callable[Params, Returned]) -> Callable[Params, Returned]:
        """``fn``, an implementation of an op, as graphs record it."""
        return fn
