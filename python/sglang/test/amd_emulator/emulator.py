"""One kernel of a code object, run on the CPU with the semantics of tinygrad's emulator and of ``wave_loop.c``."""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.test.amd_emulator import instructions
from sglang.test.amd_emulator.code_object import CodeObject
from sglang.test.amd_gate.driver import LDS_BYTES, WAVE_LANES

# tinygrad's name for the instruction sets of CDNA.
_ARCH = "cdna"
# Written to LDS before each workgroup: a read before a write shows.
_POISON = 0xA5
# Bytes past the LDS that a wrong address may reach without an error of the host.
_LDS_MARGIN = 4096
_END, _BARRIER, _NOT_COMPILED, _LIMIT, _OUTSIDE = range(5)


class EmulatorError(RuntimeError):
    """The emulator cannot run this: that says nothing of the kernel."""


class _Entry(ctypes.Structure):
    """ent_t of wave_loop.c: what runs the instruction at one place of the code."""

    _fields_ = [
        ("fn", ctypes.c_void_p), ("count", ctypes.c_uint64), ("ticks", ctypes.c_uint64), ("g", ctypes.c_uint8 * 6),
        ("flags", ctypes.c_uint8), ("kind", ctypes.c_uint8), ("x", ctypes.c_int32 * 16), ("shadow", ctypes.c_uint64),
    ]  # fmt: skip


@functools.cache
def _native() -> ctypes.CDLL:
    """wave_loop.c, compiled for this process."""
    source = Path(__file__).with_name("wave_loop.c")
    folder = tempfile.mkdtemp(prefix="amd_emulator_")
    library = os.path.join(folder, "wave_loop.so")
    options = ["-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("HOSTCC", "cc"), *options, str(source), "-o", library], check=True)
    loaded = ctypes.CDLL(library)
    loaded.run_wave.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p,
        ctypes.c_int,
    ]  # fmt: skip
    return loaded


def _eight_bit_float(code: int, exponent: int, mantissa: int, bias: int, fnuz: bool) -> float:
    if fnuz and code == 0x80:
        return float("nan")
    sign = -1.0 if code & 0x80 else 1.0
    e, m = (code >> mantissa) & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    if not fnuz and e == (1 << exponent) - 1 and (exponent == 5 or m == 7):
        return sign * float("inf") if exponent == 5 and m == 0 else float("nan")
    if e == 0:
        return sign * m * 2.0 ** (1 - bias - mantissa)
    return sign * (1 + m / (1 << mantissa)) * 2.0 ** (e - bias)


def _set_eight_bit_floats(fnuz: bool) -> None:
    """8-bit floats are OCP's on gfx950 and FNUZ on gfx942."""
    tables = [
        (ctypes.c_float * 256)(*(_eight_bit_float(code, *form, fnuz) for code in range(256)))
        for form in ((4, 3, 7 + fnuz), (5, 2, 15 + fnuz))
    ]
    _native().set_f8(*tables)


def use_tinygrad(checkout: Path) -> Any:
    """The emulator module of a tinygrad checkout, for the rest of the process; EmulatorError when there is none."""
    if not (checkout / "test" / "mockgpu" / "amd" / "emu.py").is_file():
        raise EmulatorError(f"{checkout} is no checkout of tinygrad with test/mockgpu/amd (no wheel holds that folder)")
    if _tinygrad() is None:
        os.environ.setdefault("DEV", "CPU:LLVM")
        sys.path.insert(0, str(checkout))
        for name in [name for name in sys.modules if name == "test" or name.startswith("test.")]:
            del sys.modules[name]
        _correct(importlib.import_module("test.mockgpu.amd.emu"))
    return _tinygrad()


def _tinygrad() -> Any:
    return sys.modules.get("test.mockgpu.amd.emu")


def _correct(module: Any) -> None:
    """Let tinygrad's decoder see 16 bytes only after the prefix of a scaled MFMA, and keep denormals as Triton does.

    It knows such an instruction by its second half alone, and swallows what stands before an unscaled one.
    """
    decode = module.decode_inst
    prefix = 0xD3, 0x2C

    def careful(data: bytes, arch: str = "rdna3") -> Any:
        scaled = data[3] == prefix[0] and data[2] & 0x7F == prefix[1]
        return decode(data if arch != _ARCH or scaled else data[:8], arch)

    module.decode_inst = careful


@dataclass(frozen=True)
class Run:
    """What one launch executed: instructions in all, and of each kind."""

    instructions: int
    by_kind: dict[str, int]


class KernelEmulator:
    """A kernel of a code object; instructions are compiled when they are first met."""

    def __init__(self, blob: bytes, name: str) -> None:
        self._emu = _tinygrad()
        if self._emu is None:
            raise EmulatorError("use_tinygrad has not been called")
        self._object = CodeObject(blob)
        self._descriptor = self._object.descriptor(name)
        self._metadata = self._object.kernels[name]
        self._slots = self._object.size // 4 + 1
        self._table = (_Entry * self._slots)()
        self._instructions: dict[int, Any] = {}
        self._kept: list[Any] = []

    def _compile(self, pc: int) -> None:
        """Fill the entry of the instruction at address ``pc``."""
        at = pc - self._object.base
        raw = self._object.memory[at : at + 16]
        entry, address = self._table[at >> 2], pc
        try:
            instruction = self._emu.decode_inst(raw, _ARCH)
            own = instructions.replaced(self._emu._op_name(instruction), instruction, raw)
            if own and own[0] in instructions.REWRITTEN:
                address = entry.shadow = self._keep(instructions.rewritten(*own, instruction, raw))
            if own and own[0] not in instructions.REWRITTEN:
                entry.fn = 1
            else:
                (program, runtime), _ = self._emu._decode_at(address, _ARCH)
                for place, register_file in enumerate(program.arg.globals):
                    entry.g[place] = register_file
                self._kept.append(runtime)
                entry.fn = runtime.addr
        except Exception as error:  # whatever tinygrad raises
            raise EmulatorError(f"at {at:#x}, {raw[:8].hex()}: {type(error).__name__}: {str(error)[-300:]}") from error
        if own:
            entry.kind = own[0]
            for place, value in enumerate(own[1]):
                entry.x[place] = int(value)
            entry.x[15] = instruction.size()
        entry.flags = int(instruction.op in self._emu._BARRIER_OPS)
        self._instructions[pc] = instruction

    def _keep(self, code: bytes) -> int:
        """The address of a copy of an instruction, with room for the decoder to look ahead."""
        self._kept.append(ctypes.create_string_buffer(code + b"\0" * 24))
        return ctypes.addressof(self._kept[-1])

    def launch(
        self, grid: tuple[int, int, int], args: Sequence[Any], shared: int, num_warps: int, limit: int = 2_000_000_000
    ) -> Run:
        """Run every workgroup; args: CPU tensors, integers and floats. ``limit``: instructions of a wave."""
        lds_bytes = max(shared, self._descriptor.lds)
        arch = "gfx942" if "gfx942" in self._object.target else "gfx950"
        if lds_bytes > LDS_BYTES[arch]:
            raise EmulatorError(f"LDS of {lds_bytes} bytes, {arch} has {LDS_BYTES[arch]}")
        _set_eight_bit_floats(fnuz=arch == "gfx942")
        if (self._descriptor.rsrc1 >> 16) & 3:  # denormals are kept
            self._emu._get_ftz_lib = lambda: (None, 0)
        arguments = self._arguments(args, grid, num_warps * WAVE_LANES)
        memory = ctypes.create_string_buffer(arguments + b"\0" * 64)
        lds = ctypes.create_string_buffer(lds_bytes + _LDS_MARGIN)
        done = ctypes.c_uint64(0)
        for pc in self._instructions:
            self._table[(pc - self._object.base) >> 2].count = 0
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    ctypes.memset(lds, _POISON, lds_bytes + _LDS_MARGIN)
                    self._run_workgroup((x, y, z), memory, arguments, lds, num_warps, limit, done)
        counts: collections.Counter[str] = collections.Counter()
        for pc, instruction in self._instructions.items():
            name = self._emu._op_name(instruction).lower()
            counts[name] += self._table[(pc - self._object.base) >> 2].count
        return Run(done.value, dict(counts.most_common()))

    def _run_workgroup(
        self, group: tuple[int, ...], memory: Any, arguments: bytes, lds: Any, num_warps: int, limit: int, done: Any
    ) -> None:
        user, entry = self._user_registers(ctypes.addressof(memory), arguments)
        block = num_warps * WAVE_LANES
        waves = []
        for wave in range(num_warps):
            state = self._emu._init_wave(
                entry, wave * WAVE_LANES, block, block, 1, 1, ctypes.addressof(memory), self._descriptor.rsrc2,
                self._descriptor.scratch, _ARCH, *group, user, WAVE_LANES,
            )  # fmt: skip
            scratch = ctypes.create_string_buffer(max(self._descriptor.scratch * WAVE_LANES, 16))
            files = (ctypes.c_uint64 * 6)(
                state.sgpr_buf._buf.va_addr, state.vgpr_buf._buf.va_addr, 0, ctypes.addressof(lds),
                ctypes.addressof(scratch), state.accvgpr_buf._buf.va_addr,
            )  # fmt: skip
            waves.append((state, files, scratch))
        live: Iterable[int] = range(num_warps)
        while live:
            live = [wave for wave in live if self._run_to_barrier(*waves[wave][:2], limit, done)]

    def _run_to_barrier(self, state: Any, files: Any, limit: int, done: Any) -> bool:
        """True when the wave waits at a barrier, False at its end."""
        run: Callable[..., int] = _native().run_wave
        while True:
            result = run(files, self._table, self._object.base, self._slots, limit, ctypes.byref(done), 0)
            if result != _NOT_COMPILED:
                break
            self._compile(state.pc)
        if result in (_LIMIT, _OUTSIDE):
            what = "more instructions than the limit" if result == _LIMIT else "the program counter left the code"
            raise EmulatorError(f"{what}, at {state.pc - self._object.base:#x}")
        return result == _BARRIER

    def _user_registers(self, pointer: int, arguments: bytes) -> tuple[list[int], int]:
        """Scalar registers that a wave starts with, and its first instruction.

        Dwords in the order of the descriptor's property bits, then preloaded arguments; hardware that preloads starts
        256 bytes later, after the loads for hardware that does not.
        """
        user: list[int] = []
        for bit, dwords in ((0, 4), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (6, 1)):
            if self._descriptor.properties >> bit & 1:
                user += [pointer & 0xFFFFFFFF, pointer >> 32] if bit == 3 else [0] * dwords
        entry, (length, first) = self._descriptor.entry, self._descriptor.preload
        if length:
            user += struct.unpack_from(f"<{length}I", arguments + b"\0" * 64, first * 4)
            entry += 256
        return user + [0] * (((self._descriptor.rsrc2 >> 1) & 0x1F) - len(user)), entry

    def _arguments(self, args: Sequence[Any], grid: tuple[int, int, int], block: int) -> bytes:
        """The argument block; pointers that Triton adds at the end (global and profiling scratch) are null."""
        packed = bytearray(max(self._descriptor.kernarg, 8))
        wanted = self._metadata[".args"]
        explicit = [arg for arg in wanted if not arg[".value_kind"].startswith("hidden")]
        values = [*args, *[0] * (len(explicit) - len(args))]
        if len(values) != len(explicit):
            raise EmulatorError(f"{len(values)} arguments for {len(explicit)} parameters")
        hidden = {f"hidden_block_count_{axis}": count for axis, count in zip("xyz", grid)}
        hidden |= {"hidden_grid_dims": 3, "hidden_group_size_x": block}
        hidden |= {"hidden_group_size_y": 1, "hidden_group_size_z": 1}
        given = [(arg, value) for arg, value in zip(explicit, values) if value is not None]
        given += [(arg, hidden[arg[".value_kind"]]) for arg in wanted if arg[".value_kind"] in hidden]
        for arg, value in given:
            offset, size = arg[".offset"], arg[".size"]
            value = value.data_ptr() if hasattr(value, "data_ptr") else value
            if isinstance(value, float):
                packed[offset : offset + size] = struct.pack({4: "<f", 8: "<d"}[size], value)
            else:
                packed[offset : offset + size] = int(value).to_bytes(size, "little", signed=int(value) < 0)
        return bytes(packed)
