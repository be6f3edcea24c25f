"""Which implementations of ops run, decided again for a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from sglang.kernels.registry import REGISTRY


def _forget() -> None:
    """Forget preferences, what was forced and what was decided: every op is decided again at its next call."""
    REGISTRY._preferred.clear()
    REGISTRY._forced = None
    for op in REGISTRY.ops.values():
        op.set_table(None)
    REGISTRY.records.clear()


@contextmanager
def fresh_decisions() -> Iterator[None]:
    """Decide all ops again inside the block, and again after it."""
    _forget()
    try:
        yield
    finally:
        _forget()
