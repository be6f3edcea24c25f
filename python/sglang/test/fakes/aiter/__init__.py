"""FAKE of AMD's AITER in torch: the vendor's signatures for what the engine calls, its kernels' habits included.

Memory that the vendor leaves as it was is NaN here, and what its kernels would misread raises VendorWouldCorrupt.
``fake_version`` (or ``FAKE_AITER_VERSION`` in the environment, for child processes) makes it another release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from aiter.errors import VendorWouldCorrupt
from aiter.ops.enum import ActivationType, QuantType
from aiter.ops.sample import greedy_sample

__version__ = os.environ.get("FAKE_AITER_VERSION", "0.1.7")
__all__ = ["ActivationType", "QuantType", "VendorWouldCorrupt", "fake_version", "greedy_sample"]


@contextmanager
def fake_version(version: str) -> Iterator[None]:
    """Be AITER ``version`` inside the block; the modules stay as they are."""
    global __version__
    before, __version__ = __version__, version
    try:
        yield
    finally:
        __version__ = before
