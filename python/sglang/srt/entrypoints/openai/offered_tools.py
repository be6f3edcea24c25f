"""The tools that a chat request offers to the model: checked, shown to it, and looked for in its reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.request_input import RequestError


def offered_tools(body: ChatCompletionRequest) -> dict[str, Mapping[str, Any]]:
    """Names of the tools that may be called, and the schemas of their parameters; empty where none may.

    Raises RequestError that names the field which is malformed or asks for what cannot be done.
    """
    choice = body.tool_choice
    if isinstance(choice, dict) or choice == "required":
        shown = "of a named function" if isinstance(choice, dict) else "'required'"
        raise _refusal("tool_choice", f"tool_choice {shown} is not supported: a call cannot be enforced. Use 'auto'.")
    if choice not in (None, "auto", "none"):
        raise _refusal("tool_choice", f"tool_choice must be 'auto' or 'none', got {choice!r:.100}.")
    tools: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(body.tools or []):
        where = f"tools[{number}]"
        name, parameters = _function(tool, where)
        if name in tools:
            raise _refusal("tools", f"{where}.function.name is {name!r:.100} a second time.")
        tools[name] = parameters
    return {} if choice == "none" else tools


def _function(tool: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    if kind != "function":
        raise _refusal("tools", f"{where} must be an object of type 'function', got {kind!r:.100}.")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise _refusal("tools", f"{where}.function must be an object with a name.")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _refusal("tools", f"{where}.function.parameters must be a JSON schema, an object.")
    return name, parameters


def strict_tools(body: ChatCompletionRequest) -> list[str]:
    """Names of the offered tools, which are well formed, whose arguments the client wants held to the schema."""
    return [tool["function"]["name"] for tool in body.tools or [] if tool["function"].get("strict") is True]


def check_shown(tools: Mapping[str, Any], prompt: str) -> None:
    """Raise RequestError for a tool that the chat template did not put into ``prompt``."""
    for name in tools:
        if name not in prompt:
            raise _refusal(
                "tools",
                f"The chat template of this model does not show it the tool {name!r:.100}, so it would never be "
                "called. Start the server with a --chat-template that does.",
            )


def _refusal(param: str, message: str) -> RequestError:
    return RequestError(message, param=param)
