"""FAKE of AMD's MORI on torch.distributed: the vendor's signatures and semantics between processes without a GPU.

What the vendor leaves stale is NaN here, and what it would corrupt raises ``mori.errors.VendorWouldCorrupt``.
``fake_version`` (or ``FAKE_MORI_VERSION`` in the environment, for child processes) makes it an older release.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# The release whose published wheel the signatures are held to.
__version__ = os.environ.get("FAKE_MORI_VERSION", "1.2.4")

_LAZY_SUBMODULES = ("ops", "shmem")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def fake_version(version: str) -> Iterator[None]:
    """Be MORI ``version`` inside the block; before 1.1.0 the config has no ``max_total_recv_tokens``."""
    global __version__
    from mori import ops

    before = __version__
    try:
        __version__ = version
        ops.select_config(version)
        yield
    finally:
        __version__ = before
        ops.select_config(before)
