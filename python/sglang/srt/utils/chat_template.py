"""Chat templates: where a checkpoint stores them, what they support, and rendering within limits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from sglang.srt.utils.chat_messages import (
    ROLES,
    ChatTemplateError,
    EmptyContent,
    Message,
    TemplateTraits,
    lost,
    mark_of,
    marked,
    template_messages,
)
from sglang.srt.utils.common import read_json_object, read_text
from sglang.srt.utils.limits import MAX_CHAT_TEMPLATE_CHARS
from sglang.srt.utils.template_sandbox import BoundedEnvironment, TemplateLimitError

# Names that the server or jinja sets; a client may not replace them through chat_template_kwargs.
_SERVER_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self", "loop", "caller",
     "varargs", "kwargs"}
)  # fmt: skip
# The blank at the end tells whether the template trims the text, as in transformers.
_CONTINUE_MARK = "\ue000continue\ue001 "
_MAX_LOSSLESS = 4096
_EMPTY_CONTENTS: tuple[EmptyContent, ...] = ("absent", "null", "text")
_LIMIT_REFUSAL = "The chat template asks for more than a rendering may use"


class PromptTemplate(ABC):
    """What makes a prompt of a conversation, and the ``traits`` that say in which form it reads messages.

    ``source`` is text that holds the marks and the keys of messages that it knows. A subclass makes the text.
    """

    source: str
    traits: TemplateTraits
    reserved_variables: frozenset[str] = _SERVER_VARIABLES

    def __init__(self) -> None:
        # Digests of conversations without their contents: of each, every message was seen to reach the prompt.
        self._lossless: set[bytes] = set()

    @abstractmethod
    def render_clean(self, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
        """The text for messages that are already in the template's form. Raises ChatTemplateError."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text of a conversation in OpenAI's form.

        ``continue_final_message`` ends the text right after the last message's content instead of opening a new
        assistant turn. ``variables`` are further variables of the template. Raises ChatTemplateError with the
        template's own message if it refuses the conversation, with the field's name for a message that is malformed
        or that the template leaves out of the prompt.
        """
        reserved = sorted(self.reserved_variables & (variables or {}).keys())
        if reserved:
            raise ChatTemplateError(f"chat_template_kwargs may not set {', '.join(reserved)}.")
        clean = template_messages(messages, self.traits)
        if continue_final_message:
            add_generation_prompt = False
        values = {**(variables or {}), "tools": tools, "add_generation_prompt": add_generation_prompt}
        text = self.render_clean([*clean[:-1], _mark_end(clean[-1])] if continue_final_message else clean, values)
        self._refuse_losses(text, clean, values)
        return _cut_at_mark(text) if continue_final_message else text

    def _refuse_losses(self, text: str, messages: Sequence[Message], values: Mapping[str, Any]) -> None:
        """Raise ChatTemplateError for a message or a tool that does not reach the prompt.

        Templates may leave out a part of a content, as of thoughts, but not a message: each is replaced by a mark
        that must come out, and so is the name of each tool, which messages may hold too. Where the template cannot
        render the marks, the contents and names themselves are looked for.
        """
        tools = values["tools"] or []
        marks, named, fields = marked(messages, tools)
        key = hashlib.blake2b(repr((marks, values)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._lossless:
            return
        try:
            missing = lost(self.render_clean(marks, {**values, "tools": named or values["tools"]}), fields)
        except ChatTemplateError:
            contents = ((i, m["content"]) for i, m in enumerate(messages) if isinstance(m.get("content"), str))
            missing = [f"messages[{i}].content" for i, content in contents if content.strip() not in text]
            missing += [f"tools[{i}]" for i, tool in enumerate(tools) if tool["function"]["name"] not in text]
        else:
            if len(self._lossless) >= _MAX_LOSSLESS:
                self._lossless.clear()
            if not missing:
                self._lossless.add(key)
        if not missing:
            return
        number = int(missing[0].partition("[")[2].partition("]")[0])
        if missing[0].startswith("tools"):
            name = tools[number]["function"]["name"]
            raise ChatTemplateError(
                f"The chat template of this model does not show it the tool {name!r:.100}, so it would never be "
                "called. Start the server with a --chat-template that does.",
                "tools",
            )
        raise ChatTemplateError(
            f"The chat template of this model leaves {missing[0]} (role {messages[number]['role']!r}) out of the "
            "prompt. Remove it, or put its text into a message of another role.",
            "messages",
        )


class ChatTemplate(PromptTemplate):
    """One compiled chat template and the ``traits`` that it was seen to have.

    ``special_tokens`` (bos_token, eos_token, ...) are variables of every rendering. Raises ChatTemplateError for a
    template that cannot be compiled, or that cannot render a small conversation within the limits.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any]):
        if len(source) > MAX_CHAT_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"The chat template has {len(source)} characters; at most {MAX_CHAT_TEMPLATE_CHARS} are allowed."
            )
        super().__init__()
        self.source = source
        self.special_tokens = special_tokens
        self._environment = BoundedEnvironment()
        self.reserved_variables |= special_tokens.keys() | self._environment.globals.keys()
        try:
            self._template = self._environment.load(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The chat template has a syntax error in line {error.lineno}: {error.message}"
            ) from None
        except Exception as error:  # parsers and compilers give up on hostile text in many ways
            raise ChatTemplateError(f"The chat template cannot be compiled: {type(error).__name__}: {error}") from None
        self.traits = _find_traits(self)

    def render_clean(self, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
        variables = {**self.special_tokens, "documents": None, **values, "messages": messages}
        try:
            with self._environment.budget():
                return self._template.render(variables)
        except TemplateLimitError as error:
            raise ChatTemplateError(f"{_LIMIT_REFUSAL}: {error}.", "messages") from None
        except Exception as error:  # a template runs arbitrary expressions over client data
            raise ChatTemplateError(f"The chat template refused these messages: {error}", "messages") from error


def _find_traits(template: ChatTemplate) -> TemplateTraits:
    """What the template does with small conversations. Raises ChatTemplateError where one exceeds the limits."""
    traits = TemplateTraits(empty_content="text")
    user = {"role": "user", "content": mark_of(9)}
    name, key, value, answer = (mark_of(i) for i in range(4))
    arguments = f'{{"{key}": "{value}"}}'
    function = {"name": name, "arguments": arguments}
    call = {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}]}
    turns: list[Message] = [user, call, {"role": "tool", "tool_call_id": "call00001", "content": answer}]
    forms = [TemplateTraits(mapping_arguments=m, empty_content=e) for m in (False, True) for e in _EMPTY_CONTENTS]
    for form in forms:
        text = _try(template, turns, form)
        words = (name, answer, *((key, value) if form.mapping_arguments else (arguments,)))
        if all(word in text for word in words) and "None" not in text:
            traits = form
            break
    developer = _try(template, [{"role": "developer", "content": name}, user], traits)
    traits = replace(traits, renders_developer=name in developer)
    one, two = mark_of(4), mark_of(5)
    parts = [{"type": "text", "text": one}, {"type": "text", "text": two}]
    part_roles = set()
    for role in ROLES:
        befores: dict[str, list[Message]] = {"assistant": [user], "tool": [user, call]}
        before = befores.get(role, [])
        message = {"role": role, "content": parts, "tool_call_id": "call00001", "name": name}
        as_parts = replace(traits, part_roles=frozenset({role}), renders_developer=True)
        text = _try(template, [*before, message, *([] if before or role == "user" else [user])], as_parts)
        _, first, rest = text.partition(one)
        between, second, _ = rest.partition(two)
        # A list that was printed as it stands shows its keys.
        if first and second and "text" not in between:
            part_roles.add(role)
    return replace(traits, part_roles=frozenset(part_roles))


def _try(template: ChatTemplate, messages: list[Message], traits: TemplateTraits) -> str:
    """The rendering, or "" where the template refuses."""
    try:
        return template.render_clean(
            template_messages(messages, traits), {"tools": None, "add_generation_prompt": True}
        )
    except ChatTemplateError as error:
        if str(error).startswith(_LIMIT_REFUSAL):
            raise
        return ""


def _mark_end(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK}
    if isinstance(content, list):
        last = {**content[-1], "text": content[-1]["text"] + _CONTINUE_MARK}
        return {**message, "content": [*content[:-1], last]}
    raise ChatTemplateError("continue_final_message needs a last message that ends in text.")


def _cut_at_mark(text: str) -> str:
    """``text`` up to the end of the last message's content; a template that trims content trims this too."""
    before, mark, after = text.rpartition(_CONTINUE_MARK.strip())
    if not mark:
        raise ChatTemplateError("continue_final_message: the chat template drops the last message's content.")
    return before if after.startswith(" ") else before.rstrip()


def find_chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The template of chat_template.jinja, chat_template.json or the tokenizer config; of a list, the default one."""
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return read_text(jinja_file, ChatTemplateError)
    json_file = folder / "chat_template.json"
    if json_file.is_file():
        return _pick_default(read_json_object(json_file, ChatTemplateError).get("chat_template"), str(json_file))
    return _pick_default(tokenizer_config.get("chat_template"), str(folder / "tokenizer_config.json"))


def _pick_default(value: Any, file: str) -> str | None:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {str(entry.get("name")): entry.get("template") for entry in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise ChatTemplateError(
                f"{file} has chat templates {sorted(value)} and none named 'default'; pass --chat-template."
            )
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise ChatTemplateError(f"{file}: key chat_template must be text, found {value!r:.100}.")
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
        return read_text(path, ChatTemplateError)
    template = _pick_default(read_json_object(path, ChatTemplateError).get("chat_template"), argument)
    if template is None:
        raise ChatTemplateError(f"--chat-template {argument!r}: the JSON has no 'chat_template' key.")
    return template
