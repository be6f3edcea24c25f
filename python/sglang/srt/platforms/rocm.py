"""AMD GPUs through ROCm's torch; or, without a GPU, the HIP policy over vendor fakes on the CPU."""

from __future__ import annotations

import importlib.util

import torch

from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.platforms.cuda import CudaPlatform
from sglang.srt.platforms.interface import PlatformError

VENDOR_PACKAGES = ("aiter", "mori")


class RocmPlatform(CudaPlatform):
    """torch exposes HIP as torch.cuda, so only names differ."""

    kind = "hip"
    queue_variable = ("GPU_MAX_HW_QUEUES", 4)

    def timing_event(self) -> torch.cuda.Event | None:
        try:
            return super().timing_event()
        except RuntimeError:
            if not self.is_capturing():
                raise
            return None  # torch has external events on ROCm since ROCm 7.0 only

    @property
    def arch(self) -> str:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]


class RocmOverFakesPlatform(CpuPlatform):
    """HIP policy with tensors on the CPU: serial streams, no graphs, vendor calls answered by fakes."""

    kind = "hip"

    def __init__(self, fakes: tuple[str, ...]) -> None:
        self.fakes = fakes

    @property
    def arch(self) -> str:
        return "gfx942"

    def describe(self) -> str:
        return f"hip over FAKE {', '.join(self.fakes)} on cpu (no AMD GPU is used)"


def find_fakes() -> tuple[str, ...]:
    """Vendor packages that PYTHONPATH resolves to the project's fakes."""
    found = []
    for name in VENDOR_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and "sglang/test/fakes" in spec.origin.replace("\\", "/"):
            found.append(name)
    return tuple(found)


def create_rocm_platform() -> RocmPlatform | RocmOverFakesPlatform:
    """The ROCm platform of this machine; raises PlatformError when there is neither HIP nor a fake."""
    if torch.version.hip is not None and torch.cuda.is_available():
        return RocmPlatform()
    fakes = find_fakes()
    if fakes:
        return RocmOverFakesPlatform(fakes)
    raise PlatformError(
        "SGLANG_PLATFORM=rocm was asked for, but this torch has no HIP "
        f"(torch {torch.__version__}, torch.version.hip={torch.version.hip}, "
        f"GPU visible: {torch.cuda.is_available()}) and no vendor fake is on PYTHONPATH. "
        "Install torch for ROCm, or unset SGLANG_PLATFORM."
    )
