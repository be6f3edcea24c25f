"""The groups of ranks that share one model, and the collectives that the engine uses on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

# The name since torch 2.13, and the one before it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# How gloo and NCCL say that the other side of a connection has gone.
_LOST_PEER = re.compile(r"Connection (?:reset|closed) by peer|Broken pipe|remote process (?:has )?exited")


class Pending:
    """A collective on its way."""

    def __init__(self, result: torch.Tensor, work: dist.Work | None = None) -> None:
        self._result = result
        self._work = work

    def wait(self) -> torch.Tensor:
        """The result, valid for what the current stream does from here on."""
        if self._work is not None:
            self._work.wait()
        return self._result


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
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x on every rank, in place; returns x."""
        if self.size > 1 and x.numel():
            assert self.group is not None
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0), group=self.group)
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
        assert self.cpu_group is not None
        first = dist.get_global_rank(self.cpu_group, 0)
        length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
        dist.broadcast(length, src=first, group=self.cpu_group)
        if data is not None:
            payload = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            )
        else:
            payload = torch.empty(int(length), dtype=torch.uint8)
        if payload.numel():
            dist.broadcast(payload, src=first, group=self.cpu_group)
        return payload.numpy().tobytes()

    def gather_rows(self, x: torch.Tensor) -> Pending:
        """Start to stack the ranks' x (equal shapes) along dim 0 in rank order."""
        if self.size == 1:
            return Pending(x)
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if not out.numel():
            return Pending(out)
        return Pending(out, _all_gather(out, x.contiguous(), group=self.group, async_op=True))

    def exchange_rows(self, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """Start to send each rank r the next ``sent[r]`` rows of x, and to receive ``received[r]`` rows from it."""
        if self.size == 1:
            return Pending(x)
        out = x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=self.group, async_op=True)
        return Pending(out, work)

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's ``values`` (equally many), in rank order, over the host."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        all_ranks = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_ranks, mine, group=self.cpu_group)
        return [theirs.tolist() for theirs in all_ranks]

    def all_gather_text(self, text: str, most: int = 1000) -> list[str]:
        """Every rank's ``text``, cut at ``most`` bytes, in rank order, over the host."""
        if self.size == 1:
            return [text]
        padded = text.encode()[:most].ljust(most, b"\0")
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self.all_gather_ints(list(padded))]

    def smallest(self, value: int) -> int:
        """The least of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.cpu_group)
        return int(least)


@dataclass(frozen=True)
class ParallelState:
    """Where this process stands among the ranks of one replica.

    ``world`` holds all ranks of the replica. ``tp`` holds those that share attention and dense weights: the whole world
    or, under attention data parallelism, this rank's part of it (rank ``r`` of the world is in part ``r // tp.size``).
    Experts are split over ``ep_size`` equal runs of ranks; inside a run each expert is split by its inner width.
    ``local_rank`` counts the processes of all replicas on this host: the index of this one's device.
    """

    world: ProcessGroupHandle = field(default_factory=ProcessGroupHandle)
    tp: ProcessGroupHandle = field(default_factory=ProcessGroupHandle)
    ep_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if self.world.size % self.tp.size or self.world.size % self.ep_size:
            raise ValueError(
                f"{self.world.size} ranks cannot be divided into tensor-parallel groups of {self.tp.size} and expert "
                f"parts of {self.ep_size}."
            )

    @property
    def attn_dp_size(self) -> int:
        """Independent attention groups; 1 without attention data parallelism."""
        return self.world.size // self.tp.size

    @property
    def attn_dp_rank(self) -> int:
        return self.world.rank // self.tp.size


_state = ParallelState()


def get_parallel_state() -> ParallelState:
    """This process's place; a single rank until ``init_parallel_state``."""
    return _state


def get_tp_group() -> ProcessGroupHandle:
    """The ranks that share attention and dense weights (upstream's attention TP group)."""
    return _state.tp


def get_world_group() -> ProcessGroupHandle:
    """All ranks of this replica."""
    return _state.world


def is_dp_attention_enabled() -> bool:
    """True when groups of this replica attend to different requests."""
    return _state.attn_dp_size > 1


def init_parallel_state(
    rank: int,
    world_size: int,
    init_method: str,
    backend: str,
    timeout_s: float,
    attn_dp_size: int = 1,
    ep_size: int = 1,
    local_rank: int | None = None,
) -> ParallelState:
    """Join the ``world_size`` ranks of a replica at ``init_method`` (e.g. ``tcp://127.0.0.1:29500``).

    ``local_rank`` None means ``rank``: this replica is the only one on the host. Raises ValueError when
    ``attn_dp_size`` or ``ep_size`` does not divide ``world_size``.
    """
    global _state
    local_rank = rank if local_rank is None else local_rank
    if world_size == 1:
        _state = ParallelState(local_rank=local_rank)
        return _state
    if world_size % attn_dp_size:
        raise ValueError(f"{world_size} ranks cannot be divided into {attn_dp_size} attention groups.")
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend=backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    world = _handle(list(range(world_size)), rank, backend, timeout)
    tp_size, tp = world_size // attn_dp_size, world
    if attn_dp_size > 1:
        # Every rank takes part in the making of every group, its own or not.
        parts = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
        handles = [_handle(part, rank, backend, timeout) for part in parts]
        tp = handles[rank // tp_size]
    _state = ParallelState(world, tp, ep_size, local_rank)
    return _state


def leave_groups(timeout_s: float) -> None:
    """End the groups of all ranks of the replica, which call this together, rank 0 last: it hosts the store.

    Raises RuntimeError when another rank does not come within ``timeout_s`` seconds.
    """
    global _state
    world, timeout = _state.world, timedelta(seconds=timeout_s)
    if world.size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    dist.monitored_barrier(world.cpu_group, timeout)
    dist.destroy_process_group()
    _state = ParallelState(local_rank=_state.local_rank)
    if world.rank:
        store.set(f"left{world.rank}", "")
    else:
        store.wait([f"left{rank}" for rank in range(1, world.size)], timeout)


def is_lost_peer(error: BaseException) -> bool:
    """True when a collective failed because the process of another rank has ended."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def _handle(ranks: list[int], rank: int, backend: str, timeout: timedelta) -> ProcessGroupHandle:
    group = dist.new_group(ranks, backend=backend, timeout=timeout)
    cpu_group = group if backend == "gloo" else dist.new_group(ranks, backend="gloo", timeout=timeout)
    if rank not in ranks:
        return ProcessGroupHandle()
    return ProcessGroupHandle(rank=ranks.index(rank), size=len(ranks), group=group, cpu_group=cpu_group)


@contextmanager
def override_parallel_state(state: ParallelState) -> Iterator[ParallelState]:
    """Use ``state`` inside the block (tests)."""
    global _state
    previous = _state
    _state = state
    try:
        yield state
    finally:
        _state = previous
