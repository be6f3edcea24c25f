"""What a fake raises where the vendor's kernels would read or write the wrong memory, or answer with nonsense."""

from __future__ import annotations


class VendorWouldCorrupt(RuntimeError):
    """The call breaks the vendor's contract in a way that the vendor does not check."""


def require(holds: bool, broken: str) -> None:
    """Raise VendorWouldCorrupt with ``broken`` unless the condition holds."""
    if not holds:
        raise VendorWouldCorrupt(broken)
