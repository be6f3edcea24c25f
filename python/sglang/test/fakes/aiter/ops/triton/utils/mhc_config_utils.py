"""FAKE of the lookup of tile sizes."""

from __future__ import annotations

from typing import Any

# The shape class of every size that the fake knows.
_CONFIG = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 256, "BLOCK_C": 128, "NUM_KSPLIT": 8, "num_warps": 4}


def get_mhc_config(config_name: str, M: int, C: int, mode: str | None = None) -> tuple[dict[str, Any], bool]:
    """A new dictionary, and whether it is for the width itself; KeyError where there is no entry."""
    if mode is None or mode != "sinkhorn":
        raise ValueError(f"mode must be 'sinkhorn', got '{mode}'")
    if config_name != "MHC_FUSED":
        raise KeyError(f"No matching config for M={M}, C={C}, mode={mode} in '{config_name}'")
    return dict(_CONFIG), C in (4096, 7168)
