"""Tool calls of DeepSeek-V3.1: the name, a mark, and the arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, arguments_form, json_object, quoted

_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekV31Parser(ToolCallParser):
    start, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    block_start, block_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

    @classmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        return f"{quoted(name)} {spell(_SEPARATOR)} {arguments_form(schema)}"

    def read_call(self, body: str) -> ToolCall | None:
        name, separator, arguments = body.partition(_SEPARATOR)
        if not separator or json_object(arguments) is None:
            return None
        return ToolCall(name.strip(), arguments.strip())
