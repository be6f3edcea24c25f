"""Vendor packages in tests on AMD GPUs: there they must import, and be the vendor's own."""

from __future__ import annotations

import importlib
from types import ModuleType

from sglang.srt.platforms.rocm import find_fakes


def real_vendor(module: str) -> ModuleType:
    """``module`` of a vendor package. Fails where it does not import, or is the project's fake; it never skips."""
    if module.partition(".")[0] in find_fakes():
        raise AssertionError(f"{module} is the project's fake: take python/sglang/test/fakes out of PYTHONPATH")
    return importlib.import_module(module)
