"""Tensor-parallel ranks as threads of one process that meet at a barrier: for tests of sharding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from sglang.srt.distributed.parallel_state import ParallelState, Pending, ProcessGroupHandle, override_parallel_state

T = TypeVar("T")
R = TypeVar("R")


class Meeting:
    """Where the ranks of a group lay down what they bring to a collective."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._brought: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What every rank brought, in rank order."""
        self._brought[rank] = x.clone()
        self._barrier.wait()
        everything = list(self._brought)
        self._barrier.wait()
        return everything

    def abort(self) -> None:
        """End the waiting of all ranks: one of them failed."""
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadRank(ProcessGroupHandle):
    """One rank of a group whose members are threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.meeting.exchange(self.rank, x)[0])

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim=dim)

    def gather_rows(self, x: torch.Tensor) -> Pending:
        return Pending(self.all_gather(x, dim=0))

    def exchange_rows(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        splits = self.all_gather_ints(sent)
        parts = [rows.split(sizes)[self.rank] for rows, sizes in zip(self.meeting.exchange(self.rank, x), splits)]
        assert [part.shape[0] for part in parts] == list(received), "what is received is not what is expected"
        return Pending(torch.cat(parts))

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [theirs.tolist() for theirs in self.meeting.exchange(self.rank, torch.tensor(values))]


def thread_ranks(size: int) -> list[ThreadRank]:
    """The handles of one group of ``size`` ranks."""
    meeting = Meeting(size)
    return [ThreadRank(rank=rank, size=size, meeting=meeting) for rank in range(size)]


def run_ranks(work: Callable[[T], R], per_rank: Sequence[T]) -> list[R]:
    """``work`` on each rank's own argument at the same time; results in rank order, or the first rank's own error."""
    with ThreadPoolExecutor(len(per_rank)) as pool:
        results = [pool.submit(work, own) for own in per_rank]
    errors = [error for error in (result.exception() for result in results) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [result.result() for result in results]


@contextmanager
def override_tp_group(handle: ProcessGroupHandle) -> Iterator[ProcessGroupHandle]:
    """Use ``handle`` as the only group inside the block."""
    with override_parallel_state(ParallelState(handle, handle)):
        yield handle
