"""Chat templates: where a checkpoint keeps them, and rendering them in jinja2's immutable sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sglang.srt.utils.common import read_json_object

# Names that the server sets itself; a client may not replace them through chat_template_kwargs.
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_CONTINUE_MARK = "\ue000continue\ue001"


class ChatTemplateError(ValueError):
    """The template is missing, malformed, or refused the messages."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return env


class ChatTemplate:
    """One compiled chat template.

    ``special_tokens`` (bos_token, eos_token, ...) are variables of every rendering.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any]):
        self.source = source
        self.special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Prompt text of a conversation.

        ``continue_final_message`` ends the text right after the last message's content instead of opening a new
        assistant turn. Raises ChatTemplateError with the template's own message if it refuses the conversation.
        """
        if not messages:
            raise ChatTemplateError("messages is empty: give at least one message.")
        clean = [{k: v for k, v in message.items() if v is not None} for message in messages]
        if continue_final_message:
            add_generation_prompt = False
            clean[-1] = _mark_end(clean[-1])
        try:
            text = self._template.render(
                **{
                    **self.special_tokens,
                    **variables,
                    "messages": clean,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # a template runs arbitrary expressions over client data
            raise ChatTemplateError(f"The chat template refused these messages: {error}") from error
        if continue_final_message:
            text, mark, _ = text.rpartition(_CONTINUE_MARK)
            if not mark:
                raise ChatTemplateError("continue_final_message: the chat template drops the last message's content.")
        return text


def _mark_end(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK}
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        last = {**content[-1], "text": content[-1]["text"] + _CONTINUE_MARK}
        return {**message, "content": [*content[:-1], last]}
    raise ChatTemplateError("continue_final_message needs a last message that ends in text.")


def find_chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The checkpoint's default template: ``chat_template.jinja``, ``chat_template.json``, then the tokenizer config.

    A list of named templates gives the one called "default".
    """
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    json_file = folder / "chat_template.json"
    if json_file.is_file():
        return _pick_default(read_json_object(json_file, ChatTemplateError).get("chat_template"))
    return _pick_default(tokenizer_config.get("chat_template"))


def _pick_default(value: Any) -> str | None:
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise ChatTemplateError(
                f"The checkpoint has chat templates {sorted(value)} and none named 'default'; pass --chat-template."
            )
        value = value["default"]
    return value


def load_chat_template_file(argument: str) -> str:
    """Text of the template that ``--chat-template`` names: a jinja file, or JSON with a ``chat_template`` key."""
    path = Path(argument)
    if not path.is_file():
        raise ChatTemplateError(
            f"--chat-template {argument!r}: no such file. Named built-in templates do not exist here; "
            "give the path of a .jinja file."
        )
    if path.suffix != ".json":
        return path.read_text(encoding="utf-8")
    template = _pick_default(read_json_object(path, ChatTemplateError).get("chat_template"))
    if template is None:
        raise ChatTemplateError(f"--chat-template {argument!r}: the JSON has no 'chat_template' key.")
    return template
