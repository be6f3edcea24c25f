"""FAKE ``mori.ops``: expert-parallel dispatch and combine."""

from __future__ import annotations

import mori
from mori.ops import config as _config
from mori.ops.config import EpDispatchCombineKernelType
from mori.ops.dispatch_combine import EpDispatchCombineOp

EpDispatchCombineConfig: type

__all__ = ["EpDispatchCombineConfig", "EpDispatchCombineKernelType", "EpDispatchCombineOp", "select_config"]


def select_config(version: str) -> None:
    """Bind ``EpDispatchCombineConfig`` as MORI ``version`` (major.minor...) declares it."""
    global EpDispatchCombineConfig
    release = tuple(int(part) for part in version.split(".")[:2])
    EpDispatchCombineConfig = _config.EpDispatchCombineConfig if release >= (1, 1) else _config.ConfigBefore1_1


select_config(mori.__version__)
