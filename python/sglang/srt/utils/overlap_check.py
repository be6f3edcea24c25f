"""Checks that the two sides of an overlap do not touch the same memory, as seen by torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.platforms.host_device import COLLECTIVES, tensors_in

Result = TypeVar("Result")


class OverlapConflictError(RuntimeError):
    """The two sides of an overlap touch the same memory or both enter a collective."""


def storage_accesses(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[tuple[torch.UntypedStorage, bool]]:
    """(storage, is it written) for each tensor of one dispatched call; views count as their storage.

    Arguments that the schema marks as mutated (in-place, ``out=``) and new results are written, all else is read.
    """
    known = set()
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            known.add(storage._cdata)
            yield storage, written
    for tensor in tensors_in(result):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            yield storage, True


class SideRecord(TorchDispatchMode):
    """Storages and collectives of one side; it keeps the storages, so that no address is used twice meanwhile.

    Kernels that bypass torch's dispatcher (Triton, vendor packages) are seen only through the results allocated for
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, torch.UntypedStorage] = {}
        self.written: dict[int, torch.UntypedStorage] = {}
        self.writers: dict[int, str] = {}
        self.collectives: list[str] = []

    def around(self, body: Callable[[], Result]) -> Callable[[], Result]:
        """``body``, recorded while it runs."""

        def recorded() -> Result:
            with self:
                return body()

        return recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in COLLECTIVES:
            self.collectives.append(str(func))
        for storage, written in storage_accesses(func, args, kwargs or {}, result):
            (self.written if written else self.read)[storage._cdata] = storage
            if written:
                self.writers.setdefault(storage._cdata, str(func))
        return result


def refuse_conflict(site: str, side: SideRecord, main: SideRecord) -> None:
    """Raise OverlapConflictError when one side writes what the other touches, or both enter a collective."""
    for writer, other, names in ((side, main, "side writes, main"), (main, side, "main writes, side")):
        for key in writer.written:
            touched = "writes" if key in other.written else "reads" if key in other.read else ""
            if touched and writer.written[key].nbytes():
                raise OverlapConflictError(
                    f"overlap {site}: {names} {touched} the same {writer.written[key].nbytes()} bytes "
                    f"({writer.writers[key]}). Give each side its own memory, or disable the site."
                )
    if side.collectives and main.collectives:
        raise OverlapConflictError(
            f"overlap {site}: both sides enter a collective ({side.collectives[0]}, {main.collectives[0]}), which can "
            "deadlock. Leave collectives to one side, or disable the site."
        )
