"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

import torch

from sglang.srt.platforms.interface import Platform


class CudaPlatform(Platform):
    """Device operations of torch.cuda, which ROCm builds of torch expose under the same names."""

    kind = "cuda"
    device_type = "cuda"
    supports_graphs = True
    supports_streams = True

    @property
    def arch(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def describe(self) -> str:
        return f"{self.kind} ({torch.cuda.get_device_name()}, {self.arch}, torch {torch.__version__})"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        return torch.cuda.mem_get_info(local_rank)

    def device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def set_device(self, local_rank: int) -> None:
        torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def create_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream()
