"""Tool calls of Qwen2.5 and Qwen3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, arguments_form, json_object, json_text, quoted


class Qwen25Parser(ToolCallParser):
    start, end, between = "<tool_call>", "</tool_call>", "\n"

    @classmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        head = f'\n{{"name": {json_text(name)}, "arguments": '
        return " ".join((quoted(head), arguments_form(schema), quoted("}\n")))

    def read_call(self, body: str) -> ToolCall | None:
        call = json_object(body)
        if call is None:
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, json_text(arguments))
