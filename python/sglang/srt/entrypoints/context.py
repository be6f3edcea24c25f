"""What the API's handlers share: the tokenizer manager, the settings, and whether the server is up."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig


class ServerStatus(enum.Enum):
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"


@dataclass
class ServerContext:
    """One server. ``scheduler_info`` is what the scheduler reported when it was ready."""

    manager: TokenizerManager
    server_args: ServerArgs
    model_config: ModelConfig
    scheduler_info: dict[str, Any] = field(default_factory=dict)
    status: ServerStatus = ServerStatus.STARTING

    @property
    def served_model_name(self) -> str:
        return self.server_args.served_model_name or self.server_args.model_path
