"""What a fake raises where the vendor's kernels would write past a buffer, count wrongly or hang."""

from __future__ import annotations


class VendorWouldCorrupt(RuntimeError):
    """The call breaks the vendor's contract in a way that the vendor does not check."""
