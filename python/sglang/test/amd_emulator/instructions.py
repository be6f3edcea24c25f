"""Instructions that the native loop runs itself, because tinygrad's emulator lacks them or gets them wrong on CDNA.

At tinygrad a9069c177a: no semantics for DS_READ_*_TR_*, DS_SWIZZLE, V_PERMLANE{16,32}_SWAP, V_CVT_SCALEF32_PK_* nor
for the mode register, and 8-bit floats are OCP's on gfx942 too; DPP is applied lane by lane in place, row_bcast reads
another lane, masked lanes are written; MUBUF takes every access as whole dwords; 32x32 MFMA puts results in the wrong
rows and reads A and B in AGPRs from VGPRs; scaled MFMA refuses FP6 and FP4; V_FMA_MIX loses subnormal numbers of 16
bits; in VOP1, VOP2 and VOPC of 16 bits a VGPR past 127 is taken for the high half of another, as on RDNA; what stores
to LDS from an AGPR, or uses one in an atomic operation, takes the VGPR of the same number.
"""

from __future__ import annotations

import re
from typing import Any

# Kinds of wave_loop.c.
MFMA, PERMLANE16, PERMLANE32, TRANSPOSE_READ, BPERMUTE, PERMUTE = range(1, 7)
SWIZZLE, DPP, BUFFER, MFMA_SCALED, BORROWED, WIDEN, FMA_MIX, SATURATE, TO_EIGHT_BITS, LDS_STORE = range(7, 17)
# Those that tinygrad runs in another form of the same instruction.
REWRITTEN = (DPP, BORROWED)

_ATOMICS = {"ADD": 10, "ADD_F32": 11, "SWAP": 12, "SMAX": 13, "UMAX": 14, "SMIN": 15, "UMIN": 16, "AND": 17, "OR": 18}
# Bytes of an access, and how a part of a dword is extended: 0 plain, 1 signed, 2 low half, 3 high half.
_ACCESSES = {
    "UBYTE": (1, 0), "SBYTE": (1, 1), "USHORT": (2, 0), "SSHORT": (2, 1), "UBYTE_D16": (1, 2), "UBYTE_D16_HI": (1, 3),
    "SHORT_D16": (2, 2), "SHORT_D16_HI": (2, 3), "BYTE": (1, 0), "SHORT": (2, 0), "BYTE_D16_HI": (1, 3),
    "DWORD": (4, 0), "DWORDX2": (8, 0), "DWORDX3": (12, 0), "DWORDX4": (16, 0),
}  # fmt: skip
_MFMA = re.compile(r"V_MFMA_(F32|I32)_(16X16|32X32)X(\d+)_(BF16|F16|F32|I8|BF8_BF8|BF8_FP8|FP8_BF8|FP8_FP8)$")
_MFMA_TYPES = {"BF16": 0, "F16": 1, "I8": 3, "F32": 4}
_WIDEN = re.compile(r"V_CVT_SCALEF32_PK_(F32|BF16|F16)_(FP8|BF8|FP4)(_E64)?$")
_WIDEN_WHOLE = re.compile(r"V_CVT_(PK_)?F32_(FP8|BF8)_E32$")
# What stands for the first source where a word of SDWA follows.
_SDWA = 0xF9
_TO_EIGHT_BITS = re.compile(r"V_CVT_(SCALEF32_)?PK_(FP8|BF8)_(F32|BF16|F16)(_E64)?$")
# hwreg(HW_REG_MODE, 23, 1): what is too large for 8 bits becomes the largest number.
_SATURATION_BIT = 1 | 23 << 6
_MIX = re.compile(r"V_(?:MAD|FMA)_MIX(LO|HI)?_F(?:32|16)$")
_BUFFER = re.compile(r"BUFFER_(LOAD|STORE|ATOMIC)_(LDS_)?(\w+)$")
# LDS to AGPRs, which tinygrad or the kinds above do rightly, and AGPRs to LDS.
_LDS_LOAD = re.compile(r"DS_READ(2|2ST64)?_[BUI]\d+(_TR_B\d+)?$")
_LDS_STORE = re.compile(r"DS_WRITE(2|2ST64)?_B(\d+)(_D16_HI)?$")


class Word:
    """Fields of an instruction word, lowest bit first."""

    def __init__(self, raw: bytes) -> None:
        self.value = int.from_bytes(raw[:8], "little")

    def __call__(self, low: int, bits: int) -> int:
        return (self.value >> low) & ((1 << bits) - 1)


def replaced(name: str, instruction: Any, raw: bytes) -> tuple[int, list[int]] | None:
    """Kind and operands of an instruction that the native loop runs, or None; NotImplementedError if nobody does."""
    f = Word(raw)
    if match := _MFMA.match(name):
        return MFMA, _mfma(match, f)
    if "F8F6F4" in name:
        return MFMA_SCALED, _scaled_mfma(name, f, Word(raw[8:16]) if instruction.size() == 16 else None)
    if (kept := _accumulation_data(name, instruction, f)) is not None:
        return LDS_STORE, kept
    if name in ("V_PERMLANE16_SWAP_B32_E32", "V_PERMLANE32_SWAP_B32_E32"):
        return (PERMLANE16 if "16" in name[:12] else PERMLANE32), [f(17, 8), f(0, 9) - 256]
    if match := re.match(r"DS_READ_B64_TR_B(16|8|4)$", name):
        return TRANSPOSE_READ, [f(56, 8), f(32, 8), f(0, 16), f(25, 1), int(match[1])]
    if name in ("DS_BPERMUTE_B32", "DS_PERMUTE_B32"):
        return (BPERMUTE if "BP" in name else PERMUTE), [f(56, 8), f(40, 8), f(32, 8), f(0, 16)]
    if name == "DS_SWIZZLE_B32":
        return SWIZZLE, [f(56, 8), f(32, 8), f(0, 16)]
    if type(instruction).__name__.endswith("DPP16") or hasattr(type(instruction), "dpp"):
        return DPP, _dpp(name, f)
    if type(instruction).__name__ == "MUBUF" and (match := _BUFFER.match(name)):
        return BUFFER, _buffer(name, match, f)
    if match := _WIDEN.match(name):
        form = {"FP8": 0, "BF8": 1, "FP4": 4}[match[2]]
        place = f(11, 2) if form == 4 else f(11, 1)
        return WIDEN, [f(0, 8), f(32, 9), f(41, 9), place, form, ("F32", "BF16", "F16").index(match[1])]
    if match := _WIDEN_WHOLE.match(name):
        return WIDEN, _widen_whole(match, f)
    if match := _TO_EIGHT_BITS.match(name):
        return TO_EIGHT_BITS, _to_eight_bits(match, f)
    if re.match(r"V_CVT_(SR|F32|PK_F32|SCALEF32)_.*(FP8|BF8|FP6|BF6|FP4)", name):
        raise NotImplementedError(name)
    if name == "S_SETREG_IMM32_B32":
        if f(0, 16) != _SATURATION_BIT:
            raise NotImplementedError(f"{name}: hwreg {f(0, 16):#x}")
        return SATURATE, [f(32, 1)]
    if match := _MIX.match(name):
        return FMA_MIX, _fma_mix(name, match, f)
    high = high_registers(instruction, f)
    return (BORROWED, _borrowed(high, f)) if high else None


def _accumulation_data(name: str, instruction: Any, f: Word) -> list[int] | None:
    """Operands of a store to LDS from AGPRs; None if the instruction has no AGPR that tinygrad takes for a VGPR."""
    kind = type(instruction).__name__
    if kind in ("FLAT", "GLOBAL", "SCRATCH") and f(55, 1) and "ATOMIC" in name:
        raise NotImplementedError(f"{name} of an accumulation register")
    if kind != "DS" or not f(25, 1) or _LDS_LOAD.match(name):
        return None
    match = _LDS_STORE.match(name)
    if not match:
        raise NotImplementedError(f"{name} of an accumulation register")
    size, first, second = int(match[2]) // 8, f(0, 16), 0
    if match[1]:
        unit = size * (64 if match[1] == "2ST64" else 1)
        first, second = f(0, 8) * unit, f(8, 8) * unit
    return [f(32, 8), f(40, 8), f(48, 8), first, second, size, 2 if match[1] else 1, 16 if match[3] else 0]


def _widen_whole(match: re.Match[str], f: Word) -> list[int]:
    """Without a scale; which word or byte of the source is named by SDWA alone."""
    source, place = f(0, 9), 0
    if source == _SDWA:
        source, selected = 256 + f(32, 8), f(48, 3)  # bytes are 0 to 3, words 4 and 5
        place = selected - 4 if match[1] else selected
        if not 0 <= place <= (1 if match[1] else 3):
            raise NotImplementedError(f"{match[0]}: SDWA selection {selected}")
    one = 242  # the inline constant 1.0
    return [f(17, 8), source, one, place, int(match[2] == "BF8"), 0 if match[1] else 3]


def _to_eight_bits(match: re.Match[str], f: Word) -> list[int]:
    wide = match[3] == "F32"
    scale = -1 if match[1] is None else f(50, 9) if wide else f(41, 9)
    if match[1] is None and not wide or f(8, 3) or f(61, 3):
        raise NotImplementedError(f"{match[0]}: this form")
    return [
        f(0, 8),
        f(32, 9),
        f(41, 9),
        scale,
        f(14, 1),
        int(match[2] == "BF8"),
        ("F32", "BF16", "F16").index(match[3]),
    ]


def _fma_mix(name: str, match: re.Match[str], f: Word) -> list[int]:
    sources, halves = [f(32, 9), f(41, 9), f(50, 9)], f(59, 2) | f(14, 1) << 2
    if f(15, 1) or any(halves >> place & 1 and source < 256 for place, source in enumerate(sources)):
        raise NotImplementedError(f"{name}: a clamp, or a scalar of 16 bits")
    return [f(0, 8), *sources, (None, "LO", "HI").index(match[1]), halves, f(11, 3), f(8, 3), f(61, 3)]


def high_registers(instruction: Any, f: Word) -> dict[int, int]:
    """VGPRs past 127 of a short instruction of 16 bits, by the lowest bit of the field that names them."""
    kind = type(instruction).__name__
    if kind[:4] not in ("VOP1", "VOP2", "VOPC") or "SDWA" in kind or 16 not in instruction.canonical_op_bits.values():
        return {}
    found = {0: f(0, 9) - 256} | ({} if kind.startswith("VOP1") else {9: f(9, 8)})
    found |= {} if kind.startswith("VOPC") else {17: f(17, 8)}
    return {low: register for low, register in found.items() if register > 127}


def _borrowed(high: dict[int, int], f: Word) -> list[int]:
    used = {f(0, 9) - 256, f(9, 8), f(17, 8)}
    free = [register for register in range(127, 120, -1) if register not in used]
    operands = [len(high)]
    for register, other in zip(high.values(), free):
        operands += [register, other]
    written = list(high).index(17) if 17 in high else -1
    return operands + [0] * (13 - len(operands)) + [written]


def rewritten(kind: int, operands: list[int], instruction: Any, raw: bytes) -> bytes:
    """The form of the instruction that tinygrad runs in its place: borrowed registers for what it gets wrong."""
    f = Word(raw)
    word = f.value & 0xFFFFFFFF
    if kind == DPP:
        return ((word & ~0x1FF) | (256 + operands[7])).to_bytes(4, "little")
    for place, low in enumerate(high_registers(instruction, f)):
        bits, value = (9, 256 + operands[2 + 2 * place]) if low == 0 else (8, operands[2 + 2 * place])
        word = (word & ~(((1 << bits) - 1) << low)) | (value << low)
    return word.to_bytes(4, "little") + raw[4:8]


def _mfma(match: re.Match[str], f: Word) -> list[int]:
    size, depth, kind = int(match[2][:2]), int(match[3]), match[4]
    code = _MFMA_TYPES.get(kind, 2)
    formats = [int(part == "BF8") for part in kind.split("_")] if code == 2 else [0, 0]
    operands = [f(0, 8), f(32, 9), f(41, 9), f(50, 9), f(15, 1), f(59, 1), f(60, 1)]
    return [code, size, size, depth, *operands, *formats]


def _scaled_mfma(name: str, f: Word, second: Word | None) -> list[int]:
    size, depth = (16, 128) if "16X16X128" in name else (32, 64)
    g = f if second is None else second
    selected = [f(11 + side, 1) | f(59 + side, 1) << 1 for side in range(2)]
    operands = [g(0, 8), g(32, 9), g(41, 9), g(50, 9), g(15, 1), g(59, 1), g(60, 1), g(8, 3), g(61, 3)]
    return [size, depth, *operands, int(second is not None), f(32, 9), f(41, 9), selected[0] | selected[1] << 4]


def _dpp(name: str, f: Word) -> list[int]:
    if f(54, 2):
        raise NotImplementedError(f"{name}: modifiers of the second source")
    if "16" in name and max(f(9, 8), f(17, 8)) > 127:
        raise NotImplementedError(f"{name}: 16 bits in a register past 127")
    used = {f(32, 8), f(9, 8), f(17, 8), f(17, 8) + 1, f(9, 8) + 1}
    borrowed = next(register for register in range(255, 0, -1) if register not in used)
    return [f(32, 8), f(40, 9), f(51, 1), f(52, 1), f(53, 1), f(56, 4), f(60, 4), borrowed, int("16" in name)]


def _buffer(name: str, match: re.Match[str], f: Word) -> list[int]:
    direct = f(16, 1) | bool(match[2])
    operands = [f(40, 8), f(32, 8), f(48, 5) * 4, f(56, 8), f(0, 12), f(12, 1), f(13, 1), direct, f(55, 1)]
    if match[1] == "ATOMIC":
        if match[3] not in _ATOMICS:
            raise NotImplementedError(name)
        return [*operands, 4, 0, _ATOMICS[match[3]], f(14, 1)]
    if match[3] not in _ACCESSES:
        raise NotImplementedError(name)
    size, extension = _ACCESSES[match[3]]
    return [*operands, size, int(match[1] == "STORE"), extension, 0]
