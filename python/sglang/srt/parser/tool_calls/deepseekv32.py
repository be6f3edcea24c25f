"""Tool calls of DeepSeek-V3.2: a tag per call, and one per argument, which states whether it is text or JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.parser.tool_call_parser import (
    ToolCall,
    ToolCallParser,
    definitions,
    json_form,
    json_object,
    json_text,
    json_value,
    listed_values,
    quoted,
    resolved,
    schema_types,
)

# Part of each tag; the tokenizers of these models have it as one ordinary token.
MARK = "｜DSML｜"
_AS_TEXT, _AS_JSON = '"true">', '"false">'
_CALL = re.compile(r'([^\n]+?)">(.*)', re.DOTALL)
# A value ends only before the next argument or the end of the call, because it may contain the tag itself.
_ARGUMENT = re.compile(
    rf'\s*<{MARK}parameter name="([^\n]+?)" string="(true|false)">(.*?)</{MARK}parameter>'
    rf"(?=\s*(?:<{MARK}parameter |\Z))",
    re.DOTALL,
)


class DeepSeekV32Parser(ToolCallParser):
    start, end, between = f'<{MARK}invoke name="', f"</{MARK}invoke>", "\n"
    block_start, block_end = f"<{MARK}function_calls>", f"</{MARK}function_calls>"
    lead, inside = "\n\n", "\n"
    # Unquoted text and the tag after it.
    terminals = (rf"text[lazy]: /(.|\n)*<\/{MARK}parameter>\n/",)

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        return (MARK, *super().all_marks())

    @classmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        known = resolved(schema, schema)
        properties, required = known.get("properties"), known.get("required")
        parts = [quoted(f'{name}">\n')]
        for key, value in properties.items() if isinstance(properties, Mapping) else ():
            head = quoted(f'<{MARK}parameter name="{key}" string=')
            form = f"{head} {_value_form(value, schema)}"
            parts.append(form if isinstance(required, list) and key in required else f"({form})?")
        return " ".join(parts)

    def read_call(self, body: str) -> ToolCall | None:
        found = _CALL.fullmatch(body)
        if found is None:
            return None
        name, rest = found[1].strip(), found[2]
        if rest.lstrip().startswith("{"):  # these models may also write the arguments as one object
            return None if json_object(rest) is None else ToolCall(name, rest.strip())
        arguments: dict[str, Any] = {}
        place = 0
        while argument := _ARGUMENT.match(rest, place):
            key, is_text, value = argument.groups()
            if key in arguments:
                return None
            try:
                arguments[key] = value if is_text == "true" else json_value(value)
            except ValueError:
                return None
            place = argument.end()
        return ToolCall(name, json_text(arguments)) if not rest[place:].strip() else None


def _value_form(schema: Any, root: Mapping[str, Any]) -> str:
    """Lark for what follows ``string=``: a value, unquoted if it may be a string, and the tag after it."""
    schema = schema if isinstance(schema, Mapping) else {}
    tag = quoted(f"</{MARK}parameter>\n")
    listed, types = listed_values(resolved(schema, root)), schema_types(schema, root)
    other: Mapping[str, Any] | None = schema
    texts: list[str] = []
    if listed:
        texts = [f"{quoted(value)} {tag}" for value in listed if isinstance(value, str)]
        rest = [value for value in listed if not isinstance(value, str)]
        other = {"enum": rest} if rest else None
    elif "string" in types or not schema:
        texts = ["text"]
        if types:
            rest = sorted(types - {"string"})
            other = {**schema, "type": rest} if rest else None
    forms = [f"{quoted(_AS_TEXT)} {text}" for text in texts]
    if other is not None:
        forms.append(f"{quoted(_AS_JSON)} {json_form({**other, **definitions(root)})} {tag}")
    return f"({' | '.join(forms)})"
