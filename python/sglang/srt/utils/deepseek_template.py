"""Prompts of DeepSeek-V3.2 and V4, whose folders hold no template but Python code, ``encoding/encoding_*.py``.

The code is never run. The texts that the model was trained to read before its tools, and for the greatest effort, are
string constants of that file and are taken from there; all else of the form is here.
"""

from __future__ import annotations

import ast
import json
import logging
import string
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from sglang.srt.utils.chat_messages import ChatTemplateError, Message, TemplateTraits
from sglang.srt.utils.chat_template import PromptTemplate
from sglang.srt.utils.common import read_json_object, read_text
from sglang.srt.utils.limits import MAX_CHAT_TEMPLATE_CHARS

logger = logging.getLogger(__name__)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, ANSWER = "<think>", "</think>"
DSML = "｜DSML｜"
_SWITCHES = ("thinking", "enable_thinking")
# Of the file: what a template of tools may name, and what it says.
_FIELDS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": ANSWER}
_MAX_EFFORT = "REASONING_EFFORT_MAX"


class DeepSeekTemplate(PromptTemplate):
    """The prompt of one model's form, with ``texts``, the string constants of the folder's file, {} without one."""

    # Name of the file, and of its constant about tools.
    file: ClassVar[str]
    tools_constant: ClassVar[str]
    # The tag around all calls of a turn.
    block: ClassVar[str]
    # What a result of a tool is written as; the file has it under ``tool_output_template``.
    result_form: ClassVar[str]

    def __init__(self, texts: Mapping[str, str]):
        super().__init__()
        self.texts = texts
        self.traits = TemplateTraits(mapping_arguments=True, empty_content="text", renders_developer=False)
        self.source = " ".join((BOS, EOS, USER, ASSISTANT, THINK, ANSWER, f"<{DSML}{self.block}>", self.result_form))
        if self.tools_constant in texts:
            _filled(texts[self.tools_constant], {**_FIELDS, "tool_schemas": ""})

    @classmethod
    def misfit(cls, texts: Mapping[str, str]) -> str | None:
        """The constant by which a file is of another form than this one, None where it fits."""
        expected = {
            "bos_token": BOS,
            "eos_token": EOS,
            "dsml_token": DSML,
            "thinking_start_token": THINK,
            "thinking_end_token": ANSWER,
            "tool_output_template": cls.result_form,
        }
        other = [name for name, text in expected.items() if texts.get(name, text) != text]
        efforts = [name for name in texts if name.startswith("REASONING_EFFORT") and name != _MAX_EFFORT]
        return next(iter(other + efforts), None)

    def render_clean(self, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
        thinking, effort = _switches(values), values.get("reasoning_effort")
        for number, message in enumerate(messages):
            if message["role"] == "function":
                raise ChatTemplateError(f"messages[{number}].role 'function' is not known to this model: use 'tool'.")
            if not isinstance(message.get("reasoning_content", ""), str):
                raise ChatTemplateError(f"messages[{number}].reasoning_content must be a string.")
        if values.get("add_generation_prompt") and messages[-1]["role"] not in ("user", "tool"):
            raise ChatTemplateError(
                f"messages ends with the role {messages[-1]['role']!r}, but this model replies only to 'user' and "
                "'tool'. Put the text into an earlier message, or set continue_final_message to continue an "
                "assistant's text."
            )
        start = BOS
        if effort == "max":
            if not thinking:
                raise ChatTemplateError("reasoning_effort 'max' needs chat_template_kwargs {'thinking': true}.")
            start += self._text(_MAX_EFFORT, "reasoning_effort 'max'")
        tools = values.get("tools")
        if tools:
            schemas = "\n".join(_json(tool["function"]) for tool in tools)
            text = self._text(self.tools_constant, "tools")
            shown = "\n\n" + _filled(text, {**_FIELDS, "tool_schemas": schemas})
            has_system = messages[0]["role"] == "system"
            first = {"role": "system", "content": (messages[0]["content"] if has_system else "") + shown}
            messages = [first, *messages[has_system:]]
        return start + "".join(self.turns(messages, thinking, keeps_thoughts=bool(tools)))

    @abstractmethod
    def turns(self, messages: Sequence[Message], thinking: bool, keeps_thoughts: bool) -> Iterable[str]:
        """The parts of the prompt after its start; ``keeps_thoughts`` wants those of all turns."""

    def _text(self, name: str, asked: str) -> str:
        if name not in self.texts:
            raise ChatTemplateError(
                f"{asked} needs the text that this model was trained with: {name} of encoding/{self.file}, which is "
                "not in the checkpoint's folder. Copy that file from the model's repository into it."
            )
        return self.texts[name]

    def calls(self, message: Message) -> str:
        """The calls of an assistant's turn, as the model writes them."""
        calls = message.get("tool_calls")
        if not calls:
            return ""
        parts = [
            "\n".join((f'<{DSML}invoke name="{function["name"]}">', _arguments(function), f"</{DSML}invoke>"))
            for function in (call["function"] for call in calls)
        ]
        return "\n\n" + "\n".join((f"<{DSML}{self.block}>", *parts, f"</{DSML}{self.block}>"))

    def result(self, message: Message) -> str:
        return self.result_form.replace("{content}", message["content"])


class DeepSeekV32Template(DeepSeekTemplate):
    file, tools_constant, block = "encoding_dsv32.py", "TOOLS_SYSTEM_TEMPLATE", "function_calls"
    result_form = "\n<result>{content}</result>"

    def turns(self, messages: Sequence[Message], thinking: bool, keeps_thoughts: bool) -> Iterable[str]:
        last = _last(messages, ("user",))
        calls: Sequence[Message] = ()
        place = 0
        for is_result, run in groupby(messages, lambda message: message["role"] == "tool"):
            group = list(run)
            if is_result:
                if len(group) != len(calls):
                    raise ChatTemplateError(
                        f"messages[{place}]: this model needs a result for each call, but {len(calls)} calls have "
                        f"{len(group)} results."
                    )
                results = "".join(self.result(message) for message in _in_call_order(group, calls))
                mark = THINK if thinking and place >= last else ANSWER
                yield f"\n\n<function_results>{results}\n</function_results>\n\n{mark}"
            for number, message in enumerate(() if is_result else group, place):
                content = message["content"]
                if message["role"] == "user":
                    yield f"{USER}{content}{ASSISTANT}{THINK if thinking and number == last else ANSWER}"
                elif message["role"] == "assistant":
                    thought = message.get("reasoning_content", "") + ANSWER if thinking and number > last else ""
                    yield f"{thought}{content}{self.calls(message)}{EOS}"
                else:
                    yield content
            calls = group[-1].get("tool_calls") or ()
            place += len(group)


class DeepSeekV4Template(DeepSeekTemplate):
    file, tools_constant, block = "encoding_dsv4.py", "TOOLS_TEMPLATE", "tool_calls"
    result_form = "<tool_result>{content}</tool_result>"

    def turns(self, messages: Sequence[Message], thinking: bool, keeps_thoughts: bool) -> Iterable[str]:
        last = _last(messages, ("user", "tool"))
        calls: Sequence[Message] = ()
        place = 0
        for is_input, run in groupby(messages, lambda message: message["role"] in ("user", "tool")):
            group = list(run)
            if is_input:
                yield USER + "\n\n".join(self._inputs(group, calls))
                place += len(group)
                if place == len(messages) or messages[place]["role"] == "assistant":
                    thinks = thinking and (keeps_thoughts or place > last)
                    yield ASSISTANT + (THINK if thinks else ANSWER)
                continue
            for number, message in enumerate(group, place):
                if message["role"] == "system":
                    yield message["content"]
                    continue
                thought = ""
                if thinking and (keeps_thoughts or number > last):
                    thought = message.get("reasoning_content", "") + ANSWER
                yield f"{thought}{message['content']}{self.calls(message)}{EOS}"
                calls = message.get("tool_calls") or calls
            place += len(group)

    def _inputs(self, group: Sequence[Message], calls: Sequence[Message]) -> Iterable[str]:
        """Texts of users and results of tools, which stand at the places of results in the order of their calls."""
        results = iter(_in_call_order([message for message in group if message["role"] == "tool"], calls))
        for message in group:
            yield message["content"] if message["role"] == "user" else self.result(next(results))


_FORMS: dict[str, type[DeepSeekTemplate]] = {"deepseek_v32": DeepSeekV32Template, "deepseek_v4": DeepSeekV4Template}


def find_deepseek_template(folder: Path, has_token: Callable[[str], bool]) -> DeepSeekTemplate | None:
    """The template for a checkpoint without one, None if of no known form. Raises ChatTemplateError."""
    config_file = folder / "config.json"
    config = read_json_object(config_file, ChatTemplateError) if config_file.is_file() else {}
    form = _FORMS.get(str(config.get("model_type")))
    if form is None:
        return None
    missing = [mark for mark in (BOS, EOS, USER, ASSISTANT, THINK, ANSWER) if not has_token(mark)]
    if missing:
        logger.warning("no chat: the tokenizer of %s has no token %s", folder, missing[0])
        return None
    file = folder / "encoding" / form.file
    others = sorted(path.name for path in folder.glob("encoding/encoding_*.py"))
    if others and not file.is_file():
        logger.warning("no chat: encoding/%s of %s describes an unknown prompt format", others[0], folder)
        return None
    texts = _constants(file) if file.is_file() else {}
    misfit = form.misfit(texts)
    if misfit is not None:
        logger.warning("no chat: %s has another %s than the known prompt format", file, misfit)
        return None
    return form(texts)


def _constants(file: Path) -> dict[str, str]:
    """The texts that a file of Python assigns to names at its top level."""
    code = read_text(file, ChatTemplateError)
    if len(code) > MAX_CHAT_TEMPLATE_CHARS:
        raise ChatTemplateError(f"{file} has {len(code)} characters; at most {MAX_CHAT_TEMPLATE_CHARS} are read.")
    try:
        lines = ast.parse(code).body
    except Exception as error:  # the parser gives up on hostile text in many ways
        raise ChatTemplateError(f"{file} cannot be read as Python: {error}") from None
    found: dict[str, str] = {}
    for line in lines:
        if isinstance(line, (ast.Assign, ast.AnnAssign)) and isinstance(line.value, ast.Constant):
            for target in line.targets if isinstance(line, ast.Assign) else [line.target]:
                if isinstance(target, ast.Name) and isinstance(line.value.value, str):
                    found[target.id] = line.value.value
    return found


def _filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its fields in braces replaced; none may reach into a value or format it."""
    parts = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(text):
            parts.append(literal)
            if name is not None:
                if name not in values or spec or conversion:
                    raise ValueError(f"field {name!r:.100} is not known")
                parts.append(values[name])
    except ValueError as error:
        raise ChatTemplateError(f"The tools text of the checkpoint's encoding cannot be filled in: {error}") from None
    return "".join(parts)


def _switches(values: Mapping[str, Any]) -> bool:
    """Whether the model is to think. Raises ChatTemplateError for variables that these models do not have."""
    known = {*_SWITCHES, "reasoning_effort", "tools", "add_generation_prompt"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ChatTemplateError(
            f"chat_template_kwargs {', '.join(unknown):.200}: this model knows {', '.join(_SWITCHES)} and "
            "reasoning_effort."
        )
    given = {name: values[name] for name in _SWITCHES if values.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ChatTemplateError(f"chat_template_kwargs.{name} must be true or false, got {value!r:.100}.")
    return next(iter(given.values()), False)


def _arguments(function: Mapping[str, Any]) -> str:
    lines = []
    for key, value in function["arguments"].items():
        is_text = isinstance(value, str)
        text = value if is_text else _json(value)
        lines.append(f'<{DSML}parameter name="{key}" string="{str(is_text).lower()}">{text}</{DSML}parameter>')
    return "\n".join(lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _last(messages: Sequence[Message], roles: Sequence[str]) -> int:
    return max((number for number, message in enumerate(messages) if message["role"] in roles), default=-1)


def _in_call_order(results: Sequence[Message], calls: Sequence[Message]) -> Sequence[Message]:
    """``results`` in the order of ``calls``, as the model counts on; in their own where one names no call."""
    places = {str(call.get("id")): number for number, call in enumerate(calls)}
    ids = [str(result.get("tool_call_id")) for result in results]
    if not all(name in places for name in ids):
        return results
    return [results[number] for number in sorted(range(len(ids)), key=lambda number: places[ids[number]])]
