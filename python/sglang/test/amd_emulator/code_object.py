"""An AMD code object as Triton's compiler leaves it: loaded, relocated, and what its kernels ask for."""

from __future__ import annotations

import ctypes
import mmap
import struct
from dataclasses import dataclass
from typing import Any

# Of ELF: program headers that are loaded and that hold notes, sections with symbols and with relocations.
_LOAD, _NOTE, _SYMBOLS, _RELOCATIONS = 1, 4, (2, 11), 4
_METADATA_NOTE, _RELATIVE64 = 32, 13
# The decoder looks ahead of the last instruction.
_PADDING = 0x2000


def unpack_msgpack(data: bytes, at: int = 0) -> tuple[Any, int]:
    """The value at ``at`` and where the next one begins: the part of msgpack that code objects use."""
    kind, at = data[at], at + 1

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def several(count: int, pairs: bool) -> Any:
        nonlocal at
        found = []
        for _ in range(count * (2 if pairs else 1)):
            value, at = unpack_msgpack(data, at)
            found.append(value)
        return dict(zip(found[::2], found[1::2])) if pairs else found

    if kind < 0x80 or kind >= 0xE0:
        return (kind if kind < 0x80 else kind - 256), at
    if kind < 0xA0:
        return several(kind & 15, kind < 0x90), at
    if kind < 0xC0:
        return take(kind & 31).decode(), at
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
    if 0xCC <= kind <= 0xD3:
        return int.from_bytes(take(1 << (kind - 0xCC) % 4), "big", signed=kind >= 0xD0), at
    if 0xD9 <= kind <= 0xDB:
        return take(int.from_bytes(take(1 << (kind - 0xD9)), "big")).decode(), at
    if 0xDC <= kind <= 0xDF:
        return several(int.from_bytes(take(2 << kind % 2), "big"), kind >= 0xDE), at
    raise ValueError(f"msgpack kind {kind:#x} is not read here")


@dataclass(frozen=True)
class KernelDescriptor:
    """What a kernel asks of its launch. entry: address of the first instruction; code: (offset, bytes) of all.

    kernarg, lds, scratch: bytes. preload: (dwords, first dword) of the arguments that arrive in scalar registers.
    """

    entry: int
    code: tuple[int, int]
    kernarg: int
    lds: int
    scratch: int
    rsrc1: int
    rsrc2: int
    properties: int
    preload: tuple[int, int]


class CodeObject:
    """The loaded image: ``memory`` at address ``base``, its metadata and symbols."""

    def __init__(self, blob: bytes) -> None:
        if blob[:4] != b"\x7fELF":
            raise ValueError("not an ELF code object")
        programs_at, sections_at = struct.unpack_from("<QQ", blob, 32)
        program_size, num_programs, section_size, num_sections, _ = struct.unpack_from("<5H", blob, 54)
        programs = [struct.unpack_from("<IIQQQQQQ", blob, programs_at + i * program_size) for i in range(num_programs)]
        sections = [
            struct.unpack_from("<IIQQQQIIQQ", blob, sections_at + i * section_size) for i in range(num_sections)
        ]
        self.size = max(part[3] + part[6] for part in programs if part[0] == _LOAD)
        self.memory = mmap.mmap(-1, (self.size + _PADDING) & ~0xFFF)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.metadata: dict[str, Any] = {}
        self.symbols: dict[str, tuple[int, int]] = {}
        for part in programs:
            if part[0] == _LOAD:
                self.memory[part[3] : part[3] + part[5]] = blob[part[2] : part[2] + part[5]]
            elif part[0] == _NOTE:
                self._read_notes(blob, part[2], part[2] + part[5])
        for section in sections:
            if section[1] in _SYMBOLS:
                self._read_symbols(blob, section, sections[section[6]][4])
            elif section[1] == _RELOCATIONS:
                self._relocate(blob, section)
        self.target = str(self.metadata.get("amdhsa.target", ""))
        self.kernels = {kernel[".name"]: kernel for kernel in self.metadata.get("amdhsa.kernels", [])}

    def _read_notes(self, blob: bytes, at: int, end: int) -> None:
        while at < end:
            name_size, size, kind = struct.unpack_from("<III", blob, at)
            name, at = blob[at + 12 : at + 12 + name_size].rstrip(b"\0"), at + 12 + (name_size + 3 & ~3)
            if name == b"AMDGPU" and kind == _METADATA_NOTE:
                self.metadata = unpack_msgpack(blob[at : at + size])[0]
            at += size + 3 & ~3

    def _read_symbols(self, blob: bytes, section: tuple[int, ...], names_at: int) -> None:
        for at in range(section[4], section[4] + section[5], 24):
            name_at, _, _, _, value, size = struct.unpack_from("<IBBHQQ", blob, at)
            start = names_at + name_at
            self.symbols[blob[start : blob.index(b"\0", start)].decode()] = value, size

    def _relocate(self, blob: bytes, section: tuple[int, ...]) -> None:
        for at in range(section[4], section[4] + section[5], 24):
            offset, info, addend = struct.unpack_from("<QQq", blob, at)
            if info & 0xFFFFFFFF != _RELATIVE64:
                raise ValueError(f"relocation type {info & 0xFFFFFFFF} is not handled")
            self.memory[offset : offset + 8] = struct.pack("<Q", self.base + addend)

    def descriptor(self, kernel: str) -> KernelDescriptor:
        """The descriptor of ``kernel`` (AMDGPU code object ABI)."""
        at = self.symbols[f"{kernel}.kd"][0]
        raw = self.memory[at : at + 64]
        lds, scratch, kernarg = struct.unpack_from("<III", raw, 0)
        (entry,) = struct.unpack_from("<q", raw, 16)
        _, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", raw, 44)
        return KernelDescriptor(
            self.base + at + entry, self.symbols[kernel], kernarg, lds, scratch, rsrc1, rsrc2, properties,
            (preload & 0x7F, preload >> 7),
        )  # fmt: skip
