"""Tool calls of DeepSeek-V3.1: the name, a mark, and the arguments."""

from __future__ import annotations

from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, json_object

_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekV31Parser(ToolCallParser):
    start, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    block_start, block_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

    def read_call(self, body: str) -> ToolCall | None:
        name, separator, arguments = body.partition(_SEPARATOR)
        if not separator or json_object(arguments) is None:
            return None
        return ToolCall(name.strip(), arguments.strip())
