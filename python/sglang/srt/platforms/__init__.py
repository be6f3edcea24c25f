"""The one platform of this process, chosen once from SGLANG_PLATFORM or from what torch reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from sglang.srt.environ import envs
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.platforms.cuda import CudaPlatform
from sglang.srt.platforms.interface import Platform, PlatformError
from sglang.srt.platforms.rocm import create_rocm_platform

__all__ = ["Platform", "PlatformError", "current_platform", "override_platform", "select_platform"]


def select_platform(name: str) -> Platform:
    """Platform ``name``; "" means HIP, CUDA or CPU by what torch reports. Raises PlatformError if it is missing."""
    if name == "":
        if not torch.cuda.is_available():
            return CpuPlatform()
        return CudaPlatform() if torch.version.hip is None else create_rocm_platform()
    if name == "cpu":
        return CpuPlatform()
    if name == "rocm":
        return create_rocm_platform()
    if name == "cuda":
        if torch.cuda.is_available() and torch.version.hip is None:
            return CudaPlatform()
        raise PlatformError(
            f"SGLANG_PLATFORM=cuda was asked for, but torch {torch.__version__} sees no CUDA GPU. "
            "Install a CUDA build of torch, or unset SGLANG_PLATFORM."
        )
    raise PlatformError(f"SGLANG_PLATFORM must be cpu, cuda or rocm, got {name!r}.")


class _CurrentPlatform:
    """A proxy of the selected platform: it can be imported before the choice, and follows an override."""

    def __init__(self) -> None:
        self._selected: Platform | None = None

    def __getattr__(self, name: str) -> Any:
        if self._selected is None:
            self._selected = select_platform(envs.SGLANG_PLATFORM.get())
        return getattr(self._selected, name)


_current = _CurrentPlatform()
current_platform = cast(Platform, _current)


@contextmanager
def override_platform(platform: Platform) -> Iterator[Platform]:
    """Use ``platform`` inside the block (tests)."""
    previous = _current._selected
    _current._selected = platform
    try:
        yield platform
    finally:
        _current._selected = previous
