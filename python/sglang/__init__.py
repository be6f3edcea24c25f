"""A compact serving engine for Mixture-of-Experts models. Importing it loads neither torch nor a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.version import __version__

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

__all__ = ["Engine", "ServerArgs", "__version__"]
_FRONTEND = frozenset(
    "Anthropic LiteLLM OpenAI Runtime RuntimeEndpoint VertexAI assistant assistant_begin assistant_end function gen "
    "gen_int gen_string image select separate_reasoning set_default_backend system system_begin system_end user "
    "user_begin user_end video".split()
)


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from sglang.srt.entrypoints.engine import Engine

        return Engine
    if name == "ServerArgs":
        from sglang.srt.server_args import ServerArgs

        return ServerArgs
    if name in _FRONTEND:
        raise AttributeError(
            f"sglang.{name} is part of upstream's frontend language, which this engine lacks: call a model with "
            "sglang.Engine, or start the server and use any OpenAI client"
        )
    raise AttributeError(f"module 'sglang' has no attribute {name!r}")
