"""Tool calls of DeepSeek-V3 and R1: a type, the name, and the arguments in a Markdown code fence."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, arguments_form, json_object, quoted

_BODY = re.compile(r"\s*function<｜tool▁sep｜>([^\n]+)\n```json\n(.*)\n```\s*", re.DOTALL)


class DeepSeekV3Parser(ToolCallParser):
    start, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    block_start, block_end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    between = "\n"

    @classmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        head = spell("function<｜tool▁sep｜>")
        return " ".join((head, quoted(f"{name}\n```json\n"), arguments_form(schema), quoted("\n```")))

    def read_call(self, body: str) -> ToolCall | None:
        found = _BODY.fullmatch(body)
        if found is None or json_object(found[2]) is None:
            return None
        return ToolCall(found[1].strip(), found[2].strip())
