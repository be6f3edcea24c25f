"""Converts messages of the OpenAI API for chat templates, and checks that a template renders each of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
EmptyContent = Literal["absent", "null", "text"]
# Names under which clients send back what a model thought; templates read the first or the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatTemplateError(ValueError):
    """The template is missing, malformed, or refused the messages; ``param``: the field of the body, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class TemplateTraits:
    """Properties of a template, found by rendering small conversations.

    part_roles: roles whose content it reads as a list of parts. mapping_arguments: it wants the arguments of a tool
    call as an object, not as JSON text. empty_content: what it wants as the content of an assistant turn that has tool
    calls alone: no key, null, or "". renders_developer: it knows the role "developer".
    """

    part_roles: frozenset[str] = frozenset()
    mapping_arguments: bool = False
    empty_content: EmptyContent = "absent"
    renders_developer: bool = True


def template_messages(messages: Sequence[Any], traits: TemplateTraits) -> list[Message]:
    """``messages`` as a template with ``traits`` reads them. Raises ChatTemplateError that names the wrong field."""
    if not messages:
        raise ChatTemplateError("messages is empty: give at least one message.")
    return [_template_message(message, f"messages[{i}]", traits) for i, message in enumerate(messages)]


def _template_message(message: Any, where: str, traits: TemplateTraits) -> Message:
    if not isinstance(message, dict):
        raise ChatTemplateError(f"{where} must be an object, got {type(message).__name__}.")
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.100}.")
    if message.get("audio") is not None:
        raise ChatTemplateError(f"{where}.audio is not supported: messages are text.")
    clean = {key: value for key, value in message.items() if value not in (None, [])}
    call = clean.pop("function_call", None)  # the older spelling of one tool call
    if call is not None and "tool_calls" not in clean:
        clean["tool_calls"] = [{"type": "function", "function": call}]
    if role == "developer" and not traits.renders_developer:
        clean["role"] = "system"
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(clean["tool_calls"], f"{where}.tool_calls", traits)
    thoughts = next((clean[key] for key in _REASONING_KEYS if key in clean), None)
    if thoughts is not None:
        clean = {"thinking": thoughts, **clean, "reasoning_content": thoughts}
    clean["content"] = _content(clean, where, traits)
    if not clean["content"] and "tool_calls" in clean:
        clean["content"] = None if traits.empty_content == "null" else ""
        if traits.empty_content == "absent":
            del clean["content"]
    return clean


def _content(message: Message, where: str, traits: TemplateTraits) -> str | list[Message]:
    """The content as text, or as parts where the template reads parts."""
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ChatTemplateError(
                    f"{where}.content[{number}] is a part of type {kind!r:.100}: only text parts are supported."
                )
        if role in traits.part_roles:
            return content
        # What the client wrote and nothing between, as in templates that read parts.
        content = "".join(part["text"] for part in content)
    elif content is None and role == "assistant":
        content = message.get("refusal", "")
    elif content is None and role == "user":
        raise ChatTemplateError(f"{where}.content is missing: give a string or a list of text parts.")
    elif content is None:
        content = ""
    if not isinstance(content, str):
        raise ChatTemplateError(f"{where}.content must be a string or a list of parts, got {type(content).__name__}.")
    return content


def _tool_calls(calls: Any, where: str, traits: TemplateTraits) -> list[Message]:
    if not isinstance(calls, list):
        raise ChatTemplateError(f"{where} must be a list, got {type(calls).__name__}.")
    result = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatTemplateError(f"{where}[{number}].function must be an object with a name.")
        arguments = _arguments(function.get("arguments"), f"{where}[{number}].function.arguments", traits)
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def _arguments(given: Any, where: str, traits: TemplateTraits) -> Any:
    """The arguments in the template's form; text that is passed on as text stays exactly what it was."""
    parsed, text = given, given
    if given is None or given == "":
        parsed, text = {}, "{}"
    elif isinstance(given, str):
        try:
            parsed = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ChatTemplateError(f"{where} is not valid JSON: {error}") from None
    elif isinstance(given, dict):
        text = json.dumps(given, ensure_ascii=False)
    if not isinstance(parsed, dict):
        raise ChatTemplateError(f"{where} must be a JSON object, got {type(parsed).__name__}.")
    return parsed if traits.mapping_arguments else text


# Check that nothing is lost


def mark_of(number: int) -> str:
    """Digits alone, which no filter for case, space or escapes changes; all marks have one length."""
    return f"6180339887{number:06d}"


def marked(messages: Sequence[Message], tools: Sequence[Message]) -> tuple[list[Message], list[Message], list[str]]:
    """``messages`` with a mark for each content, ``tools`` with one for each name, and the field that each mark stands
    for."""
    fields: list[str] = []

    def mark(field: str) -> str:
        fields.append(field)
        return mark_of(len(fields) - 1)

    marks = [_marked_message(message, f"messages[{i}]", mark) for i, message in enumerate(messages)]
    named = [{**tool, "function": {**tool["function"], "name": mark(f"tools[{i}]")}} for i, tool in enumerate(tools)]
    return marks, named, fields


def _marked_message(message: Message, where: str, mark: Callable[[str], str]) -> Message:
    content = message.get("content")
    calls = message.get("tool_calls")
    copy = dict(message)
    if isinstance(content, list):
        texts = [(n, part) for n, part in enumerate(content) if part["text"]]
        new = {n: {**part, "text": mark(f"{where}.content[{n}]")} for n, part in texts}
        copy["content"] = [new.get(n, part) for n, part in enumerate(content)]
    elif content or not calls:
        copy["content"] = mark(f"{where}.content")
    if calls:
        copy["tool_calls"] = [_marked_call(call, f"{where}.tool_calls[{j}]", mark) for j, call in enumerate(calls)]
    return copy


def _marked_call(call: Message, where: str, mark: Callable[[str], str]) -> Message:
    function = {**call["function"], "name": mark(where)}
    text = mark(f"{where}.function.arguments")
    function["arguments"] = {text: text} if isinstance(function["arguments"], dict) else text
    return {**call, "function": function}


def lost(text: str, fields: Sequence[str]) -> list[str]:
    """The fields whose marks are not in ``text``."""
    return [field for number, field in enumerate(fields) if mark_of(number) not in text]
