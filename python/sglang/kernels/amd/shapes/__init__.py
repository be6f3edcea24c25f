"""Serving shapes at which each op's Triton launchers are compiled for AMD: one module a group of ops, found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Instructions that a well compiled kernel holds, as regular expressions over the assembly.
MFMA_BF16 = r"v_mfma_f32_\d+x\d+x\d+_bf16"
WIDE_LOAD = r"(buffer|global)_load_dwordx4"
WIDE_BUFFER_LOAD = r"buffer_load_dwordx4"


@dataclass(frozen=True)
class ServingShape:
    """Arguments of one op at one serving shape; ``expect``: by kernel name, instructions that its code must hold."""

    op: str
    label: str
    arguments: Callable[[], tuple[Any, ...]]
    expect: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def shape_only(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A contiguous tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def all_shapes() -> Iterator[ServingShape]:
    """The shapes of every module in this package, which each give theirs in ``shapes()``."""
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__, __name__ + ".")):
        yield from importlib.import_module(module).shapes()
