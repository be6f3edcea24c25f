"""The tools that a chat request offers to the model: checked, shown to it, and looked for in its reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.request_input import RequestError


def offered_tools(body: ChatCompletionRequest) -> dict[str, Mapping[str, Any]]:
    """Names and parameter schemas of the tools that may be called. Raises RequestError that names the wrong field."""
    choice = body.tool_choice
    tools: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(body.tools or []):
        where = f"tools[{number}]"
        name, parameters = _function(tool, where)
        if name in tools:
            raise RequestError(f"{where}.function.name is {name!r:.100} a second time.", param="tools")
        tools[name] = parameters
    if isinstance(choice, dict):
        _named(choice, tools)
    elif choice not in (None, "auto", "none", "required"):
        raise RequestError(
            f"tool_choice must be 'auto', 'none' or 'required', got {choice!r:.100}.", param="tool_choice"
        )
    elif choice == "required" and not tools:
        raise RequestError("tool_choice 'required' needs tools that can be called.", param="tool_choice")
    return {} if choice == "none" else tools


def forced_tools(body: ChatCompletionRequest) -> dict[str, Mapping[str, Any]]:
    """The tools of which one must be called, as of ``offered_tools``; empty if the reply may be text."""
    choice = body.tool_choice
    if isinstance(choice, dict):
        tools = offered_tools(body)
        name = _named(choice, tools)
        return {name: tools[name]}
    return offered_tools(body) if choice == "required" else {}


def max_calls(body: ChatCompletionRequest) -> int | None:
    """How many calls the reply may have, None for any number: one where a function is named."""
    return 1 if body.parallel_tool_calls is False or isinstance(body.tool_choice, dict) else None


def _named(choice: Mapping[str, Any], tools: Mapping[str, Any]) -> str:
    """The tool that ``choice`` names."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise RequestError(
            "tool_choice as an object must be {type: 'function', function: {name: ...}}.", param="tool_choice"
        )
    if name not in tools:
        raise RequestError(f"tool_choice names {name!r:.100}, which is none of the tools.", param="tool_choice")
    return name


def _function(tool: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    if kind != "function":
        raise RequestError(f"{where} must be an object of type 'function', got {kind!r:.100}.", param="tools")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{where}.function must be an object with a name.", param="tools")
    if name != name.strip() or "\n" in name or ">" in name:
        raise RequestError(
            f"{where}.function.name is {name!r:.100}, which no call could say: a name has no white space at its ends, "
            "no line break and no '>'.",
            param="tools",
        )
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where}.function.parameters must be a JSON schema, an object.", param="tools")
    return name, parameters
