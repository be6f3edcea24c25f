"""The bare CPU: eager torch, no streams, no graphs, float32 by default."""

from __future__ import annotations

import platform as host

import psutil
import torch

from sglang.srt.platforms.interface import Platform


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
        return memory.available, memory.total

    def set_device(self, local_rank: int) -> None:
        """There is one."""

    def synchronize(self) -> None:
        """Work on the host is done when its call returns."""

    def auto_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.float32
