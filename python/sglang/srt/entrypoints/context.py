"""What the API's handlers share: the tokenizer manager, the settings, and whether the server is up."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs


class ServerStatus(enum.Enum):
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"


class ModelDescription(Protocol):
    """The part of ModelConfig that the API shows."""

    @property
    def architecture(self) -> str: ...

    @property
    def context_len(self) -> int: ...

    @property
    def hf_config(self) -> dict[str, Any]: ...

    @property
    def generation_defaults(self) -> dict[str, Any]: ...


@dataclass
class ServerContext:
    """One server. ``scheduler_info`` is what the scheduler reported when it was ready."""

    manager: TokenizerManager
    server_args: ServerArgs
    model_config: ModelDescription
    scheduler_info: dict[str, Any] = field(default_factory=dict)
    status: ServerStatus = ServerStatus.STARTING

    @property
    def served_model_name(self) -> str:
        return self.server_args.served_model_name or self.server_args.model_path
