"""Which implementations of ops run, decided again for a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from sglang.kernels.registry import REGISTRY


@contextmanager
def fresh_decisions() -> Iterator[None]:
    """Decide all ops again inside the block, and again after it."""
    REGISTRY.reset()
    try:
        yield
    finally:
        REGISTRY.reset()
