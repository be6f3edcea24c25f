"""One NaN or infinity among the inputs of an op: where it must come out, and what it must leave alone."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sglang.kernels.impl import Impl, OpSpec
from sglang.test.op_cases import Case

# Of 8-bit floats one byte that is NaN; of exponents alone (MXFP4's scales) the same.
NAN_BYTES = {torch.float8_e4m3fn: 0x7F, torch.float8_e4m3fnuz: 0x80}


@dataclass(frozen=True)
class Poison:
    """Element ``at`` of argument ``arg`` becomes ``value``."""

    arg: int
    at: tuple[int, ...]
    value: float

    def put(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A copy of ``args``, each with its strides, with this element changed."""
        copied = copy_args(args)
        target = copied[self.arg]
        if target.itemsize == 1:
            target.view(torch.uint8)[self.at] = NAN_BYTES[target.dtype]
        else:
            target[self.at] = self.value
        return copied


def copy_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies with the same strides, gaps included."""
    return tuple(
        torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype).copy_(arg)
        if isinstance(arg, torch.Tensor)
        else arg
        for arg in args
    )


def poisons(case: Case, values: tuple[float, ...] = (math.nan, math.inf, -math.inf)) -> Iterator[Poison]:
    """For each floating argument and value one element, which depends on the names alone."""
    for number, arg in enumerate(case.args):
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point() or not arg.numel():
            continue
        for value in values if arg.itemsize > 1 else values[:1]:
            place = zlib.crc32(f"{case.name} {number} {value}".encode()) % arg.numel()
            yield Poison(number, tuple(map(int, torch.unravel_index(torch.tensor(place), arg.shape))), value)


def results(impl: Impl, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an implementation returns, and what it makes of its arguments."""
    args = copy_args(args)
    out = impl.fn(*args)
    made = (out,) if isinstance(out, torch.Tensor) else out
    return [one for one in (*made, *args) if isinstance(one, torch.Tensor)]


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, last dimension], 8-bit floats as float32; elements of a vector are rows of their own."""
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return wide.reshape(-1, wide.shape[-1] if wide.ndim > 1 else 1).contiguous()


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of rows, whether all bits are equal: [rows] bool."""
    return (one.view(torch.uint8) == other.view(torch.uint8)).all(1)


def complaint(
    found: list[torch.Tensor], clean: list[torch.Tensor], wanted: list[torch.Tensor], wanted_clean: list[torch.Tensor]
) -> str | None:
    """Why ``found`` is not what the reference says of the same poisoned inputs; None if it is.

    clean, wanted_clean: both without the poison. A result is wrong that is a number where the reference has none, that
    is none in a row (of the last dimension) where the reference has numbers alone, or that differs in a row that the
    poison does not change for the reference.
    """
    for number, parts in enumerate(zip(found, clean, wanted, wanted_clean, strict=True)):
        if not parts[0].numel():
            continue
        ours, before, theirs, theirs_before = map(_rows, parts)
        if ours.is_floating_point():
            finite = theirs.isfinite()
            if bool((ours.isfinite() & ~finite).any()):
                return f"result {number} is a number where the reference has none"
            if bool((~ours.isfinite() & finite.all(1, keepdim=True)).any()):
                return f"result {number} is no number in a row where the reference has numbers alone"
        if not bool(_same(ours, before)[_same(theirs, theirs_before)].all()):
            return f"result {number} changes in a row that the poison does not reach"
    return None


class Sweep:
    """All poisons of one case, against the reference of its op."""

    def __init__(self, op: OpSpec, case: Case) -> None:
        self.op, self.case = op, case
        self.reference = op.impls[-1]
        self.wanted_clean = results(self.reference, case.args)

    def complaints(self, impl: Impl, chosen: list[Poison]) -> Iterator[tuple[Poison, str]]:
        """What is wrong with ``impl`` under each of the ``chosen`` poisons."""
        clean = results(impl, self.case.args)
        for poison in chosen:
            args = poison.put(self.case.args)
            wanted = results(self.reference, args)
            text = complaint(results(impl, args), clean, wanted, self.wanted_clean)
            if text is not None:
                yield poison, text
