"""Input and output types of a step of resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.server_args import ServerArgs

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.platforms import Platform


@dataclass(frozen=True)
class Change:
    """One field that resolution set, and why."""

    field: str
    old: Any
    new: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new} ({self.reason})"


@dataclass(frozen=True)
class Context:
    """What steps may read; ``model`` is None if its config cannot be read."""

    platform: Platform
    model: ModelConfig | None
    mamba_ssm_dtype: str
    # Tokens that a rank may dispatch in one forward; entries that SGLANG_OPT_C4_SPARSE_TOPK names; and the fields that
    # the user set rather than left to resolution.
    dispatch_limit: int = 0
    sparse_topk: int = 0
    given: frozenset[str] = frozenset()


# A step yields its changes, and errors as text.
Step = Callable[[ServerArgs, Context], Iterator[Change | str]]
