"""FAKE of AMD's AITER in torch: the vendor's signatures for what the engine calls, its kernels' habits included.

Memory that the vendor leaves as it was is NaN here, and what its kernels would misread raises VendorWouldCorrupt.
"""

from __future__ import annotations

from aiter.errors import VendorWouldCorrupt
from aiter.ops.enum import ActivationType, QuantType
from aiter.ops.sample import greedy_sample

__version__ = "0.1.7"
__all__ = ["ActivationType", "QuantType", "VendorWouldCorrupt", "greedy_sample"]
