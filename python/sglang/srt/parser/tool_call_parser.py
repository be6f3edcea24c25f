"""Finds tool calls in an answer that arrives in pieces; incomplete or invalid calls stay text."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang.srt.parser.text_marks import partial_mark

# White space between the tokens of JSON; without a bound a model may repeat it without end.
JSON_WHITE_SPACE = r"[ \n\r\t]{1,40}"
# Keywords of a schema that say which types and values it allows, and how many parts of one are read: it may be cyclic.
_OF_VALUES = ("type", "enum", "const", "anyOf", "oneOf", "properties", "required", "additionalProperties")
_MAX_PARTS = 256
# End marks within the strings of one call; with more it is text.
_MAX_PASSED = 32
# The rest of a JSON string.
_STRING_END = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# A mark that may be one special token.
_MARK = re.compile("(<[^<>\\s]+>)")
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
    "string": (str,),
}


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


# Text of the answer, or a call, in the order of the reply.
Event = str | ToolCall


class ToolCallParser(ABC):
    """Processes the text of one answer. A subclass defines the marks around a call and parses the text between them.

    A call is returned when it is complete. One that is malformed, cut off, or of a tool that is not offered is returned
    as text, marks included. ``tools`` maps the names of the offered tools to the JSON schema of
    their parameters. ``max_calls`` is how many calls are wanted; later ones stay text. White space around a call is
    dropped. The events, joined, do not depend on how the text was split.
    """

    start: ClassVar[str]
    end: ClassVar[str]
    # Marks around all calls together and text between calls, if the format has them; dropped with a valid call.
    block_start: ClassVar[str] = ""
    block_end: ClassVar[str] = ""
    between: ClassVar[str] = ""
    # Text before such a block and within its marks, as the model was trained to write them.
    lead: ClassVar[str] = ""
    inside: ClassVar[str] = ""
    # Lines of Lark that ``call_form`` needs.
    terminals: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], max_calls: int | None = None):
        self._tools = tools
        self._max_calls = max_calls
        self.num_calls = 0
        self._text = ""
        # Characters of a call in which no end mark was found, and end marks in them that are part of a JSON string.
        self._searched = self._num_passed = 0
        # Where the text of the string begins that contains the last of them: no call ends before it does.
        self._open_string: int | None = None
        # White space and a mark of a block, which are text unless a call follows.
        self._before = ""
        # Inside a block with a valid call, so that its end mark is not text.
        self._in_block = False
        self._marks = tuple(mark for mark in (self.start, self.block_start, self.block_end) if mark)

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        """The marks of the format, in the order in which a reply has them."""
        return tuple(mark for mark in (cls.block_start, cls.start, cls.end, cls.block_end) if mark)

    @classmethod
    def grammar(
        cls,
        tools: Mapping[str, Mapping[str, Any]],
        max_calls: int | None,
        token_id: Callable[[str], int | None],
        answer: Any = None,
    ) -> str:
        """A grammar, in llguidance's Lark, of replies with at most ``max_calls`` calls of ``tools`` and no text.

        ``token_id`` returns the token whose text is a mark, None if there is none. With ``answer``, a JSON schema, a
        reply may also be JSON that follows it.
        """

        def spell(text: str) -> str:
            parts = [(part, token_id(part) if part.startswith("<") else None) for part in _MARK.split(text) if part]
            return " ".join(quoted(part) if number is None else f"<[{number}]>" for part, number in parts)

        forms = [
            f"{spell(cls.start)} {cls.call_form(name, schema, spell)} {spell(cls.end)}"
            for name, schema in tools.items()
        ]
        more = "" if max_calls == 1 else f"({quoted(cls.between)} call)*"
        first, last = quoted(cls.lead) + " " + spell(cls.block_start + cls.inside), spell(cls.inside + cls.block_end)
        lines = [
            "start: calls" if answer is None else f"start: calls | {json_form(answer)}",
            f"calls: {first} call {more} {last}",
            "call: " + " | ".join(f"call_{number}" for number in range(len(forms))),
        ]
        lines += [f"call_{number}: {form}" for number, form in enumerate(forms)]
        return "\n".join([*lines, *cls.terminals])

    @classmethod
    @abstractmethod
    def call_form(cls, name: str, schema: Mapping[str, Any], spell: Callable[[str], str]) -> str:
        """What stands between the marks of a call of tool ``name``, in Lark; ``schema`` is that of its parameters.

        ``spell`` returns the Lark of text that contains further marks.
        """

    @abstractmethod
    def read_call(self, body: str) -> ToolCall | None:
        """The call whose marks enclose ``body``; None if it is malformed."""

    def feed(self, text: str) -> list[Event]:
        """New events after ``text``."""
        self._text += text
        events: list[Event] = []
        while self._text:
            if self._text.startswith(self.start):
                if not self._take_call(events):
                    break
            elif not self._take_text(events):
                break
        return events

    def finish(self) -> list[Event]:
        """The remaining events at the end of the reply."""
        rest, self._text, self._before = self._before + self._text, "", ""
        return [rest] if rest.strip() or rest and not self.num_calls else []

    def _take_call(self, events: list[Event]) -> bool:
        """Parse the call at the beginning of the text; False while it is not complete."""
        while (length := self._text.find(self.end, self._searched)) >= 0:
            body, length = self._text[len(self.start) : length], length + len(self.end)
            last = self._num_passed == _MAX_PASSED
            if last or self._open_string is None or _STRING_END.match(body, self._open_string):
                call = self.read_call(body)
                self._open_string = _open_string(body) if call is None and not last else None
                if self._open_string is None:
                    break
            self._searched, self._num_passed = length, self._num_passed + 1
        else:
            self._searched = max(self._searched, len(self._text) - len(self.end))
            return False
        self._searched = self._num_passed = 0
        raw, self._text = self._text[:length], self._text[length:]
        inner = raw.rfind(self.start, 1)
        if call is None and inner > 0:  # an incomplete call, and another one
            events.append(self._before + raw[:inner])
            self._text = raw[inner:] + self._text
        elif call is None or call.name not in self._tools or self.num_calls == self._max_calls:
            events.append(self._before + raw)
        else:
            self.num_calls += 1
            self._in_block = bool(self.block_start)
            events.append(call)
        self._before = ""
        return True

    def _take_text(self, events: list[Event]) -> bool:
        """Take text up to the next mark; False if only the start of a mark, or nothing, is left."""
        found = [place for mark in self._marks if (place := self._text.find(mark)) >= 0]
        kept = min(found, default=len(self._text) - partial_mark(self._text, self._marks))
        text, self._text = self._text[:kept], self._text[kept:]
        spoken = text.rstrip()
        if spoken:
            events.append(self._before + spoken)
            self._before = ""
        self._before += text[len(spoken) :]
        if not found or self._text.startswith(self.start):
            return bool(found)
        mark = self.block_start if self._text.startswith(self.block_start) else self.block_end
        self._text = self._text[len(mark) :]
        if mark == self.block_end and self._in_block:
            self._in_block, self._before = False, ""
        else:
            self._before += mark
        return True


def _open_string(body: str) -> int | None:
    """Where the text of the JSON string begins that the end of ``body`` cuts, and that may contain an end mark."""
    begin = max(0, body.find("{"))
    try:
        json.JSONDecoder().raw_decode(body[begin:])
    except json.JSONDecodeError as error:
        return begin + error.pos + 1 if error.msg.startswith("Unterminated string") else None
    except RecursionError:
        pass
    return None


def quoted(text: str) -> str:
    """``text`` as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def json_form(schema: Any) -> str:
    """Lark for JSON that follows ``schema``."""
    if isinstance(schema, Mapping):
        schema = {"x-guidance": {"whitespace_pattern": JSON_WHITE_SPACE}, **schema}
    return f"%json {json.dumps(schema)}"


def arguments_form(schema: Mapping[str, Any]) -> str:
    """Lark for an object, the arguments of a tool, that follows ``schema``."""
    return json_form({"type": "object", **schema})


def listed_values(schema: Mapping[str, Any]) -> list[Any]:
    """The values that a schema lists; empty if it lists none."""
    listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return listed if isinstance(listed, list) else []


def definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    """What parts of ``root`` may refer to, for a schema that contains only one of them."""
    return {key: root[key] for key in ("$defs", "definitions") if key in root}


def resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """What a schema, a part of ``root``, says of types and values, itself or by its ``$ref`` and ``allOf``."""
    found: dict[str, Any] = {}
    parts = [schema]
    for part in parts:  # which grow meanwhile
        if isinstance(part, Mapping):
            found = {key: part[key] for key in _OF_VALUES if key in part} | found
            all_of = part.get("allOf")
            more = [_referred(part.get("$ref"), root), *(all_of if isinstance(all_of, list) else ())]
            parts += more[: _MAX_PARTS - len(parts)]
    return found


def _referred(ref: Any, root: Any) -> Any:
    """The part of ``root`` that ``ref``, as ``#/$defs/Point``, names; None if there is none."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    for key in ref.split("/")[1:]:
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def schema_types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a schema, a part of ``root``, allows, by name or by its values; empty if it has neither."""
    types: set[str] = set()
    options = [schema]
    for option in options:  # which grow meanwhile
        known = resolved(option, root)
        named, values = known.get("type", []), listed_values(known)
        names = {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
        types |= names or {name for value in values for name, kinds in JSON_TYPES.items() if type(value) in kinds}
        for key in ("anyOf", "oneOf"):
            more = known.get(key)
            options += more[: _MAX_PARTS - len(options)] if isinstance(more, list) else []
    return types


def json_value(text: str) -> Any:
    """The value of strict JSON. Raises ValueError, also for NaN, infinities and numbers too large for a float."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_object(text: str) -> dict[str, Any] | None:
    """``text`` as a JSON object; None if it is not one."""
    try:
        found = json_value(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def json_text(value: Any) -> str:
    """JSON of a value that ``json_value`` may return."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain only as an escape
        return json.dumps(value)
    return text


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # dumped again it would not be JSON
        raise ValueError(f"{text:.40} is too large for a float")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
