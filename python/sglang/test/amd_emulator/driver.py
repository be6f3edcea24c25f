"""Triton launches on CPU tensors: compiled for an AMD architecture as on the machine, and run in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from sglang.test.amd_emulator.emulator import KernelEmulator, Run
from sglang.test.amd_gate.driver import CompileOnlyDriver

# Triton keeps compiled kernels by device number: apart from the compile-only driver's.
_DEVICES = 200_000


@dataclass(frozen=True)
class EmulatedLaunch:
    """One launch that ran."""

    kernel: str
    grid: tuple[int, int, int]
    run: Run


class EmulatingDriver(CompileOnlyDriver):
    """The compile-only driver, whose launches also run."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.ran: list[EmulatedLaunch] = []

    def get_current_device(self) -> int:
        return _DEVICES + super().get_current_device()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        types = list(source.signature.values())
        kernels: list[KernelEmulator] = []

        def launch(grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
            # Stream, function, packed metadata, launch metadata and two hooks stand before the arguments.
            args = [_value(kind, arg) for kind, arg in zip(types, rest[6:]) if kind != "constexpr"]
            if not kernels:
                files = self._files[metadata.hash]
                path = next(path for name, path in files.items() if name.endswith(".hsaco"))
                kernels.append(KernelEmulator(Path(path).read_bytes(), metadata.name))
            grid = (grid_x, grid_y, grid_z)
            run = kernels[0].launch(grid, args, metadata.shared, metadata.num_warps)
            self.ran.append(EmulatedLaunch(metadata.name, grid, run))

        return launch


def _value(kind: str, arg: Any) -> Any:
    return float(arg) if kind in ("fp32", "f32", "fp64", "f64") else arg


_drivers: dict[str, EmulatingDriver] = {}


@contextmanager
def emulated(arch: str) -> Iterator[EmulatingDriver]:
    """Inside the block Triton's kernels run in the emulator, on CPU tensors; ``driver.ran`` lists what did."""
    previous, listener = triton.runtime.driver._active, knobs.compilation.listener
    driver = _drivers.setdefault(arch, EmulatingDriver(arch))
    driver.ran = []
    triton.runtime.driver.set_active(driver)
    knobs.compilation.listener = driver.on_compiled
    hook, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, driver.before_compiling
    try:
        yield driver
    finally:
        triton.runtime.driver._active = previous
        knobs.compilation.listener = listener
        knobs.runtime.jit_cache_hook = hook
