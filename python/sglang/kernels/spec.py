"""An operation and its implementations: the torch reference defines it, the first that fits runs it."""

from __future__ import annotations

from typing import Any

from sglang.kernels.impl import Impl, OpSpec
from sglang.kernels.registry import REGISTRY

__all__ = ["Impl", "Op"]


class Op(OpSpec):
    """A named operation; calling it runs the first implementation that fits."""

    def __init__(self, name: str, *impls: Impl) -> None:
        super().__init__(name, *impls)
        REGISTRY.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._direct is not None:
            return self._direct(*args, **kwargs)
        return REGISTRY.dispatch(self, args, kwargs)
