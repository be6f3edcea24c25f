"""The tensor-parallel group of this process and the collectives that the engine uses on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ProcessGroupHandle:
    """Rank and size of a group; every collective is the identity when ``size`` is 1."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    # Host-side messages (requests) travel over a CPU group even where tensors live on a GPU.
    cpu_group: dist.ProcessGroup | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns x."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors (equal shapes) along ``dim`` in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Send rank 0's bytes to every rank (length first, then payload); other ranks pass None."""
        if self.size == 1:
            assert data is not None
            return data
        length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
        dist.broadcast(length, src=0, group=self.cpu_group)
        if data is not None:
            payload = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            )
        else:
            payload = torch.empty(int(length), dtype=torch.uint8)
        if payload.numel():
            dist.broadcast(payload, src=0, group=self.cpu_group)
        return payload.numpy().tobytes()

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.cpu_group)
        return int(least)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


_SINGLE = ProcessGroupHandle()
_tp_group = _SINGLE


def get_tp_group() -> ProcessGroupHandle:
    """The tensor-parallel group; a single rank until ``init_tp_group``."""
    return _tp_group


def init_tp_group(rank: int, size: int, init_method: str, backend: str, timeout_s: float) -> ProcessGroupHandle:
    """Join the tensor-parallel group of ``size`` ranks at ``init_method`` (e.g. ``tcp://127.0.0.1:29500``)."""
    global _tp_group
    if size == 1:
        _tp_group = _SINGLE
        return _tp_group
    dist.init_process_group(
        backend=backend, init_method=init_method, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    group = dist.group.WORLD
    cpu_group = group if backend == "gloo" else dist.new_group(backend="gloo")
    _tp_group = ProcessGroupHandle(rank=rank, size=size, group=group, cpu_group=cpu_group)
    return _tp_group


@contextmanager
def override_tp_group(handle: ProcessGroupHandle) -> Iterator[ProcessGroupHandle]:
    """Use ``handle`` inside the block (tests)."""
    global _tp_group
    previous = _tp_group
    _tp_group = handle
    try:
        yield handle
    finally:
        _tp_group = previous
