"""What tests and the AMD emulator run each op on: arguments on the CPU, ugly ones included.

Module ``<group>`` holds the cases of the ops ``<group>.*``, one function per op, of its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang.kernels.impl import OpSpec


@dataclass(frozen=True)
class Case:
    """One set of arguments of an op."""

    name: str
    args: tuple[Any, ...]


def cases_of(op: OpSpec) -> Iterator[Case]:
    """The cases of ``op``; LookupError where none are written."""
    group, name = op.name.split(".")
    try:
        cases = getattr(importlib.import_module(f"{__name__}.{group}"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise LookupError(f"op {op.name} has no cases; write {name}() in sglang/test/op_cases/{group}.py") from error
    return cases()
