"""Tool calls of Qwen2.5 and Qwen3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, json_object, json_text


class Qwen25Parser(ToolCallParser):
    start, end = "<tool_call>", "</tool_call>"

    def read_call(self, body: str) -> ToolCall | None:
        call = json_object(body)
        if call is None:
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, json_text(arguments))
