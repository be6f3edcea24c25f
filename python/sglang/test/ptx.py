"""Straight-line PTX of inline assembly, run on the CPU by its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _and_or(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    assert int(table) == 0xEA, "(a & b) | c alone"
    return a & b | c


def run_ptx(text: str, operands: list[Tensor | None]) -> dict[str, Tensor]:
    """The straight-line PTX on int64 tensors of 32 bits, operands by number changed in place: what sm_90 would do."""
    registers = {f"${i}": operand for i, operand in enumerate(operands)}

    def value(word):
        return registers[word] if word in registers else torch.tensor(int(word, 0))

    def halves(word):
        bits = value(word)
        parts = [((bits >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16) for shift in (0, 16)]
        return [part.float() for part in parts]

    for line in text.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(maxsplit=1)
        target, *given = [word.strip() for word in rest.split(",")]
        if op == "prmt.b32":
            both = value(given[0]) | value(given[1]) << 32
            chosen = [(int(given[2], 0) >> (4 * i)) & 15 for i in range(4)]
            assert max(chosen) < 8
            registers[target] = sum(((both >> (8 * byte)) & 0xFF) << (8 * i) for i, byte in enumerate(chosen))
        elif op == "mul.bf16x2":
            low, high = (a * b for a, b in zip(halves(given[0]), halves(given[1])))
            bits = [part.bfloat16().view(torch.int16).long() & 0xFFFF for part in (low, high)]
            registers[target] = bits[0] | bits[1] << 16
        else:
            simple: dict[str, Callable[..., Tensor]] = {
                "mov.b32": lambda a: a,
                "and.b32": lambda a, b: a & b,
                "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
                "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
                "shr.u32": lambda a, b: a >> b,
                "lop3.b32": _and_or,
            }
            registers[target] = simple[op](*map(value, given))
    return registers
