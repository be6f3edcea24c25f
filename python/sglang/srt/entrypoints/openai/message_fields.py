"""Keys of chat messages that reach neither the server nor the template."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.request_fields import UnknownFields

# What OpenAI's clients put into a message, or get back in one and send again.
_MESSAGE_KEYS = frozenset(
    (
        "annotations", "content", "function_call", "name", "reasoning", "reasoning_content", "refusal", "role",
        "tool_call_id", "tool_calls",
    )
)  # fmt: skip
_PART_KEYS = frozenset(("text", "type"))


def check_message_keys(
    messages: list[dict[str, Any]], template: str, unknown_fields: UnknownFields, warnings: list[str] | None
) -> None:
    """Check keys that neither the API nor ``template``, the chat template's source, names. Raises RequestError."""
    items = [(message, _MESSAGE_KEYS, "messages.") for message in messages]
    for message in messages:
        content = message.get("content")
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        items += [(part, _PART_KEYS, "messages.content.") for part in parts if part.get("type") == "text"]
    for item, known, where in items:
        unknown = {key: value for key, value in item.items() if key not in known and key not in template}
        if unknown:
            unknown_fields.judge(unknown, known, where, warnings)
