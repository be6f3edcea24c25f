"""Tool calls of Qwen3-Coder and Qwen3.5: a tag per function, and one per argument around its unquoted value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.parser.tool_call_parser import (
    JSON_TYPES,
    ToolCall,
    ToolCallParser,
    definitions,
    json_form,
    json_text,
    json_value,
    listed_values,
    quoted,
    resolved,
    schema_types,
)

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
# A value ends only before the next argument or the end of the function, because it may contain the tag itself.
_ARGUMENT = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL)
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


class Qwen3CoderParser(ToolCallParser):
    start, end, between = "<tool_call>", "</tool_call>", "\n"

    terminals = (r"text[lazy]: /(.|\n)*\n<\/parameter>\n/",)

    @classmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        known = resolved(schema, schema)
        properties, required = known.get("properties"), known.get("required")
        parts = [quoted(f"\n<function={name}>\n")]
        for key, value in properties.items() if isinstance(properties, Mapping) else ():
            form = f"{quoted(f'<parameter={key}>' + chr(10))} {_value_form(value, schema)}"
            parts.append(form if isinstance(required, list) and key in required else f"({form})?")
        return " ".join((*parts, quoted("</function>\n")))

    def read_call(self, body: str) -> ToolCall | None:
        function = _FUNCTION.fullmatch(body)
        if function is None:
            return None
        name, rest = function[1].strip(), function[2]
        schema = self._tools.get(name, {})
        known = resolved(schema, schema)
        properties, others = known.get("properties"), known.get("additionalProperties")
        properties = properties if isinstance(properties, Mapping) else {}
        arguments: dict[str, Any] = {}
        place = 0
        while found := _ARGUMENT.match(rest, place):
            key = found[1].strip()
            # The format has line breaks around a value.
            arguments[key] = _value(found[2].removeprefix("\n").removesuffix("\n"), properties.get(key, others), schema)
            place = found.end()
        return ToolCall(name, json_text(arguments)) if not rest[place:].strip() else None


def _value_form(schema: Any, root: Mapping[str, Any]) -> str:
    """Lark for an unquoted value and the tag after it; a string is any text without that tag, or a listed one."""
    tag = quoted("\n</parameter>\n")
    known, types = resolved(schema, root), schema_types(schema, root)
    if types and "string" not in types:
        return f"{json_form({**schema, **definitions(root)})} {tag}"
    listed = listed_values(known)
    if not listed:
        return "text"
    texts = [value if isinstance(value, str) else "null" for value in listed if value is None or isinstance(value, str)]
    return f"({' | '.join(quoted(text) for text in texts)}) {tag}"


def _value(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """``text`` as a type of its schema; a string if it does not fit, or has no schema."""
    types = schema_types(schema, root)
    if not types or "string" in types:
        return None if text == "null" and "null" in types else text
    try:
        value = _PYTHON_WORDS[text.strip()] if text.strip() in _PYTHON_WORDS else json_value(text)
    except ValueError:
        return text
    wanted = tuple(kind for name in types for kind in JSON_TYPES.get(name, ()))
    fits = isinstance(value, wanted) and not (isinstance(value, bool) and bool not in wanted)
    return value if fits else text
