"""What an operation is made of: its implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    Static conditions, checked once per process: ``kinds`` of platform, ``archs`` (prefixes), an importable ``package``
    (or module of one) of at least ``min_version``, ``needs_device`` (not runnable where tensors live on the host) and
    the switch ``enabled``. Per call: ``accepts(*args, **kwargs)`` reads shapes, dtypes and strides and never device
    data.
    """

    name: str
    fn: Callable[..., Any]
    kinds: frozenset[str] | set[str] | None = None
    archs: tuple[str, ...] | None = None
    package: str | None = None
    min_version: tuple[int, ...] = ()
    needs_device: bool = False
    enabled: Callable[[], bool] | None = None
    accepts: Callable[..., bool] | None = None


class OpSpec:
    """A named operation as the registry knows it: implementations, and which of them may run.

    Implementations are given best first; the last is the unrestricted torch reference, which defines the op.
    """

    def __init__(self, name: str, *impls: Impl) -> None:
        if not impls or _is_restricted(impls[-1]):
            raise ValueError(f"op {name}: the last implementation must be the unrestricted reference")
        names = [impl.name for impl in impls]
        if len(set(names)) != len(names):
            raise ValueError(f"op {name}: two implementations share a name: {names}")
        self.name = name
        self.group = name.split(".")[0]
        self.impls = impls
        self.reference = impls[-1].fn
        self.table: tuple[Impl, ...] | None = None
        self._direct: Callable[..., Any] | None = None

    def set_table(self, table: tuple[Impl, ...] | None) -> None:
        """Store the frozen candidates; a single unconditional one is called without any check."""
        self.table = table
        self._direct = table[0].fn if table is not None and len(table) == 1 and table[0].accepts is None else None


def _is_restricted(impl: Impl) -> bool:
    conditions = (impl.kinds, impl.archs, impl.package, impl.enabled, impl.accepts)
    return impl.needs_device or any(condition is not None for condition in conditions)
