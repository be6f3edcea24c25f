"""The CPU: eager torch, no streams, no graphs, float32 by default."""

from __future__ import annotations

import platform as host
from pathlib import Path

import psutil
import torch

from sglang.srt.platforms.interface import Platform

CONTROL_GROUP = Path("/sys/fs/cgroup")


def container_memory(root: Path) -> tuple[int, int] | None:
    """(limit, use without reclaimable file cache) of the control group at ``root`` in bytes; None without a limit.

    Control groups v2 and v1. A process that exceeds the limit is killed, even if the machine has free memory.
    """
    for folder, limit_file, use_file, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, use = int((folder / limit_file).read_text()), int((folder / use_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return limit, use - int(stat.get(cache, 0))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


class CpuPlatform(Platform):
    """Eager torch on the host processor."""

    kind = "cpu"
    device_type = "cpu"

    @property
    def arch(self) -> str:
        return "cpu"

    def describe(self) -> str:
        return f"cpu ({host.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads)"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        limit, use = container_memory(CONTROL_GROUP) or (memory.total, 0)
        return max(0, min(memory.available, limit - use)), min(memory.total, limit)

    def set_device(self, local_rank: int) -> None:
        """Does nothing: there is only one."""

    def synchronize(self) -> None:
        """Does nothing: work on the host is complete when its call returns."""
