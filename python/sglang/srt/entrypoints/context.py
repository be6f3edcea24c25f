"""What the API's handlers share: the tokenizer manager, the settings, and whether the server is up."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.request_input import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

# Names that a client may always use for the served model.
DEFAULT_MODEL_NAME = "default"
_MAX_SHOWN_NAME = 100


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
    # The process of the engine that makes no progress now, or None.
    stalled: str | None = None

    @property
    def served_model_name(self) -> str:
        return self.server_args.served_model_name or self.server_args.model_path

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for a model not served; no name, "", "default" and a path's last part are."""
        served = self.served_model_name
        if not name or name in (DEFAULT_MODEL_NAME, served):
            return
        if served == self.server_args.model_path and name.rstrip("/") in (served.rstrip("/"), Path(served).name):
            return
        adapter = " Adapters cannot be loaded." if name.startswith(f"{served}:") else ""
        shown = name if len(name) <= _MAX_SHOWN_NAME else f"{name[:_MAX_SHOWN_NAME]}..."
        raise RequestError(
            f"The model {shown!r} does not exist; this server serves {served!r}.{adapter}",
            404,
            "NotFoundError",
            param="model",
            code="model_not_found",
        )
