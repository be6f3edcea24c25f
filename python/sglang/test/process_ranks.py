"""Ranks as forked processes that meet over gloo: for tests of what only separate processes can do."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

FAKES = Path(__file__).resolve().parent / "fakes"
TIMEOUT = timedelta(seconds=60)


def use_fakes() -> None:
    """Make ``mori`` and ``aiter`` of this process, and of those that it starts, the project's fakes."""
    if str(FAKES) not in sys.path:
        sys.path.insert(0, str(FAKES))
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(FAKES)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FAKES), *others])


def run_processes(world_size: int, work: Callable[[int], None]) -> None:
    """``work(rank)`` in ``world_size`` forks that share a gloo default group; AssertionError holds their errors."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, work, Path(folder))
            children.append(pid)
        failed = [rank for rank, pid in enumerate(children) if os.waitpid(pid, 0)[1] != 0]
        texts = [_read(Path(folder) / f"error{rank}") for rank in failed]
    if failed:
        raise AssertionError(f"ranks {failed} of {world_size} failed:\n" + "\n".join(texts))


def _child(rank: int, world_size: int, work: Callable[[int], None], folder: Path) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=TIMEOUT
        )
        work(rank)
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        # Neither the parent's exit handlers nor its test runner may run here.
        os._exit(status)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else f"{path.name}: ended without a message"
