"""A Triton driver without a GPU: kernels launched under it are specialised, compiled for a target, recorded, not run.

Tensors may be of the ``meta`` device: Triton reads their type, the alignment of their address (storage starts at an
aligned 0) and the size of their storage, which are all that its specialisation needs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# Local data share of a compute unit in bytes, and compute units. CDNA3 and CDNA4 white papers.
LDS_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10}
COMPUTE_UNITS = {"gfx942": 304, "gfx950": 256}
WAVE_LANES = 64
MAX_WORKGROUP_LANES = 1024


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, Triton's metadata and the text of its assembly.

    digest: hash of source, specialisation, options and target of the code. A launch whose digest was known
    beforehand was not compiled; its assembly is empty.
    """

    kernel: str
    grid: tuple[int, int, int]
    metadata: dict[str, Any]
    assembly: str
    digest: str = ""


def target_of(arch: str) -> GPUTarget:
    """Triton's target for "gfx942" or "gfx950", or "sm_90" for a check of the CUDA side."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, WAVE_LANES)


class _Utils:
    """The device queries that a launch makes. Nothing is refused here, so that the gate can report the problem."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 256, "warpSize": WAVE_LANES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), name, 0, 0, 1 << 16

    def unload_module(self, module: Any) -> None:
        return None


class CompileOnlyDriver:
    """The part of Triton's driver interface that a launch uses (triton 3.6 to 3.9)."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.target = target_of(arch)
        self.utils = _Utils()
        self.launches: list[Launch] = []
        self.known: Callable[[str, str], bool] = _nothing_known
        self._files: dict[str, dict[str, str]] = {}
        self._digests: dict[str, str] = {}
        self._compiling = ""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device number: each architecture needs one that no real device has.
        return 1000 + zlib.crc32(self.arch.encode()) % 100_000

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Called by Triton once per compiled kernel; the result is called at each launch."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
            text, digest = _read_assembly(self._files[metadata.hash]), self._digests[metadata.hash]
            self.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z), metadata._asdict(), text, digest))

        return launch

    def before_compiling(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles or reads its cache; True, for a known digest, means that it does neither."""
        name = fn.name.rpartition(".")[2]
        self._compiling = _digest(fn.jit_function.cache_key, compile["specialization_data"], self.target)
        if not self.known(name, self._compiling):
            return False
        self.launches.append(Launch(name, (0, 0, 0), {}, "", self._compiling))
        return True

    def on_compiled(self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        """Triton's compilation listener, called for cache hits too: remember where the files of a kernel are."""
        self._files[metadata["hash"]] = metadata_group
        self._digests[metadata["hash"]] = self._compiling


def _nothing_known(kernel: str, digest: str) -> bool:
    return False


def _digest(source_key: str, specialization: str, target: GPUTarget) -> str:
    """A hash of the code that Triton would generate, the same on every machine."""
    described = json.loads(specialization)
    # Paths of device libraries differ between machines, and ``key`` contains them.
    for place in (described, described["options"]):
        for machine in ("key", "extern_libs"):
            place.pop(machine, None)
    text = json.dumps([source_key, described, target.backend, target.arch, target.warp_size], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_assembly(files: dict[str, str]) -> str:
    path = next(path for name, path in files.items() if name.endswith((".amdgcn", ".ptx")))
    return Path(path).read_text(encoding="utf-8")


@functools.cache
def _driver_of(arch: str) -> CompileOnlyDriver:
    """One per process: Triton keeps the result of ``launcher_cls`` as long as the kernel."""
    return CompileOnlyDriver(arch)


@contextmanager
def compile_only(arch: str, known: Callable[[str, str], bool] = _nothing_known) -> Iterator[CompileOnlyDriver]:
    """Inside the block, launches of Triton kernels compile for ``arch`` and are added to ``driver.launches``.

    ``known(kernel, digest)`` is True for code that need not be compiled.
    """
    previous, listener = triton.runtime.driver._active, knobs.compilation.listener
    hook = knobs.runtime.jit_cache_hook
    driver = _driver_of(arch)
    driver.launches, driver.known = [], known
    triton.runtime.driver.set_active(driver)
    knobs.compilation.listener = driver.on_compiled
    knobs.runtime.jit_cache_hook = driver.before_compiling
    try:
        yield driver
    finally:
        triton.runtime.driver._active = previous
        knobs.compilation.listener = listener
        knobs.runtime.jit_cache_hook = hook
