"""FAKE ``mori.shmem``: remembers the process group that symmetric memory would span."""

from __future__ import annotations

import torch.distributed as dist

_group: dist.ProcessGroup | None = None


def shmem_torch_process_group_init(group_name: str) -> int:
    """Adopt the registered process group ``group_name``; returns 0. Collective over the group.

    RuntimeError without torch.distributed or when called twice; ValueError for a group without global rank 0, from
    which the vendor broadcasts its unique id.
    """
    global _group
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed not initialized")
    if _group is not None:
        raise RuntimeError("shmem is initialized already; call shmem_finalize first")
    group = dist.distributed_c10d._resolve_process_group(group_name)
    if 0 not in dist.get_process_group_ranks(group):
        raise ValueError(f"process group {group_name!r} does not contain global rank 0")
    dist.barrier(group)
    _group = group
    return 0


def shmem_finalize() -> int:
    global _group
    _group = None
    return 0


def shmem_mype() -> int:
    return dist.get_rank(required_group())


def shmem_npes() -> int:
    return dist.get_world_size(required_group())


def shmem_barrier_all() -> None:
    dist.barrier(required_group())


def shmem_num_qp_per_pe() -> int:
    return 4


def required_group() -> dist.ProcessGroup:
    """The group of the initialised shmem; RuntimeError before that."""
    if _group is None:
        raise RuntimeError("shmem is not initialized: call mori.shmem.shmem_torch_process_group_init first")
    return _group
