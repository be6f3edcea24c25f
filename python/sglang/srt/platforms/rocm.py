"""AMD GPUs through ROCm's torch; or, without a GPU, the HIP policy over vendor fakes on the CPU."""

from __future__ import annotations

import importlib.util
import os

import torch

from sglang.srt.environ import envs
from sglang.srt.platforms.cuda import CudaPlatform
from sglang.srt.platforms.host_device import HostStreamsPlatform
from sglang.srt.platforms.interface import PlatformError

VENDOR_PACKAGES = ("aiter", "mori")
# The variable of the HIP runtime that bounds the hardware queues of a process, and its default.
QUEUE_VARIABLE = ("GPU_MAX_HW_QUEUES", 4)


class RocmPlatform(CudaPlatform):
    """torch exposes HIP as torch.cuda, so only names differ."""

    kind = "hip"
    queue_variable = QUEUE_VARIABLE

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


class RocmOverFakesPlatform(HostStreamsPlatform):
    """HIP policy on the CPU: serial streams, recorded graphs, fakes; arch None takes SGLANG_FAKE_ROCM_ARCH."""

    kind = "hip"
    queue_variable = QUEUE_VARIABLE

    def __init__(self, fakes: tuple[str, ...], arch: str | None = None) -> None:
        super().__init__()
        self.fakes = fakes
        self._arch = arch or envs.SGLANG_FAKE_ROCM_ARCH.get()

    @property
    def arch(self) -> str:
        return self._arch

    def describe(self) -> str:
        return f"hip ({self.arch}) over FAKE {', '.join(self.fakes)} on cpu (no AMD GPU is used)"


def find_fakes() -> tuple[str, ...]:
    """Vendor packages that PYTHONPATH resolves to the project's fakes."""
    found = []
    for name in VENDOR_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and "sglang/test/fakes" in os.path.realpath(spec.origin):
            found.append(name)
    return tuple(found)


def create_rocm_platform() -> RocmPlatform | RocmOverFakesPlatform:
    """The ROCm platform of this machine: HIP's, or the CPU's if vendor packages are the project's fakes.

    Raises PlatformError if there is neither, or if fakes would replace vendor packages that a ROCm build of torch could
    call, unless SGLANG_ALLOW_VENDOR_FAKES is set.
    """
    fakes = find_fakes()
    if fakes and torch.version.hip is not None and not envs.SGLANG_ALLOW_VENDOR_FAKES.get():
        raise PlatformError(
            f"this torch is for ROCm {torch.version.hip}, and {', '.join(fakes)} on its path "
            f"{'is the FAKE' if len(fakes) == 1 else 'are the FAKES'} of this project, which would be used instead of "
            "AMD's kernels. Remove python/sglang/test/fakes from PYTHONPATH, or set SGLANG_ALLOW_VENDOR_FAKES=1 to "
            "run on the CPU over them."
        )
    if fakes:
        return RocmOverFakesPlatform(fakes)
    if torch.version.hip is not None and torch.cuda.is_available():
        return RocmPlatform()
    raise PlatformError(
        "SGLANG_PLATFORM=rocm was asked for, but this torch has no HIP "
        f"(torch {torch.__version__}, torch.version.hip={torch.version.hip}, "
        f"GPU visible: {torch.cuda.is_available()}) and no vendor fake is on PYTHONPATH. "
        "Install torch for ROCm, or unset SGLANG_PLATFORM."
    )
