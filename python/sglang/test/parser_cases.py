"""Replies of models with thoughts and tool calls, what the parsers must find in them, and ways to cut them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.parser.tool_call_parser import ToolCall, ToolCallParser, json_value
from sglang.srt.parser.tool_calls.deepseekv3 import DeepSeekV3Parser
from sglang.srt.parser.tool_calls.deepseekv4 import DeepSeekV4Parser
from sglang.srt.parser.tool_calls.deepseekv31 import DeepSeekV31Parser
from sglang.srt.parser.tool_calls.deepseekv32 import DeepSeekV32Parser
from sglang.srt.parser.tool_calls.qwen3_coder import Qwen3CoderParser
from sglang.srt.parser.tool_calls.qwen25 import Qwen25Parser

# Where the reply begins (see ReasoningParser), the reply, its thought and its answer.
REPLIES = (
    (True, "First, 27+58.\n</think>\n\n85", "First, 27+58.", "85"),
    (True, "<think>\nopened twice\n</think>\n\n85", "opened twice", "85"),
    (True, "\n\n</think>\n\nno thought", "", "no thought"),
    (True, "</think>", "", ""),
    (True, "cut off by the  limit  \n", "cut off by the  limit", ""),
    (True, "a < b </thin k> </ think>\n c</think>d", "a < b </thin k> </ think>\n c", "d"),
    (True, "cut inside the mark </thi", "cut inside the mark </thi", ""),
    (True, "x <think> y</think> z", "x <think> y", "z"),
    (None, "\n<think>\nnaïve 你好\n</think>\n\nYes 😀\n ", "naïve 你好", "Yes 😀\n "),
    (None, "<think></think>", "", ""),
    (None, "  plain, with <think>late</think> marks ", "", "  plain, with <think>late</think> marks "),
    (None, " \n", "", " \n"),
    (None, "<thin", "", "<thin"),
    (None, "<think>never ended", "never ended", ""),
    (False, "<think>is text here</think> ", "", "<think>is text here</think> "),
    (False, "", "", ""),
)

TOOLS = {
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": ["number", "null"]}, "exact": {"type": "boolean"}}},
    "note": {"properties": {"text": {"type": "string"}, "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]}}},
    "now": {},
}
MARK = "｜DSML｜"
CALLS, CALL, SEP, END, ENDS = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END}"


def v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{END}"


def dsml(name: str, arguments: str) -> str:
    tags = [
        f'<{MARK}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{MARK}parameter>"
        for key, value in json.loads(arguments).items()
    ]
    return "\n".join([f'<{MARK}invoke name="{name}">', *tags, f"</{MARK}invoke>"])


def qwen(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name: str, **arguments: object) -> str:
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"


# Numbers past a float's, which JSON allows, and Python would write as Infinity.
HUGE = '{"a": 1, "b": -1e999}'
ADD, NOTE = '{"a": 1, "b": 2}', '{"text": "naïve 😀 \\"x\\" }"}'
# Events that are expected: text, or a name and the value of the arguments.
ADDED, NOTED = ("add", json.loads(ADD)), ("note", json.loads(NOTE))


def json_forms(call: Callable[[str, str], str], first: str = "", last: str = "") -> list[tuple[str, list[Any]]]:
    """Replies of a form whose arguments are JSON text, and their events."""
    add, note = call("add", ADD), call("note", NOTE)
    return [
        (f"Let me see.\n\n{first}{add}{last}", ["Let me see.", ADDED]),
        (f"{first}{add}\n{note}{last}\n", [ADDED, NOTED]),
        (f"{first}{note}{last} and then", [NOTED, " and then"]),
        (f"{first}{add}{call('note', '[1]')}{last}", [ADDED, call("note", "[1]")]),
        (f"x {first}{call('rm', '{}')}{last} y", [f"x {first}{call('rm', '{}')}{last} y"]),
        (f"{first}{call('add', '{broken')}{add}{last}", [f"{first}{call('add', '{broken')}", ADDED]),
        (f"{first}{add[:-3]}", [f"{first}{add[:-3]}"]),
        (f"{first}{call('add', '{')[:-6]}{add}", [f"{first}{call('add', '{')[:-6]}", ADDED]),
        (f"{first}{call('add', '{NaN')}", [f"{first}{call('add', '{NaN')}"]),
        (f"{first}{call('add', HUGE)}", [f"{first}{call('add', HUGE)}"]),
        (f"{first}{call('now', '{}')}{last}", [("now", {})]),
    ]


def dsml_forms(block: str) -> list[tuple[str, list[Any]]]:
    """Replies in a block of calls, and their events."""
    first, last = f"\n\n<{MARK}{block}>\n", f"\n</{MARK}{block}>"
    add, note, whole = dsml("add", ADD), dsml("note", NOTE), f'<{MARK}invoke name="add">{ADD}</{MARK}invoke>'
    tag, end = f'<{MARK}parameter name="text" string=', f"</{MARK}parameter>"
    odd = f"\n two\n {tag} {end} </b> lines \n"
    broken = [
        dsml("rm", "{}"),
        add[:-4],
        f'<{MARK}invoke name="note">{tag}"false">bare{end}</{MARK}invoke>',
        f'<{MARK}invoke name="note">{tag}"true">a{end}{tag}"true">b{end}</{MARK}invoke>',
        f'<{MARK}invoke name="note">{tag}"maybe">a{end}</{MARK}invoke>',
        f'<{MARK}invoke name="note">{tag}"true">a</{MARK}invoke>',
        f'<{MARK}invoke name="note">{{"text": NaN}}</{MARK}invoke>',
        f'<{MARK}invoke name="note">{tag}"false">-1e999{end}</{MARK}invoke>',
        f'<{MARK}invoke name="note">said</{MARK}invoke>',
        f"<{MARK}invoke name=note></{MARK}invoke>",
    ]
    return [
        (f"Let me see.{first}{add}{last}", ["Let me see.", ADDED]),
        (f"{first}{add}\n{note}{last}\n", [ADDED, NOTED]),
        (f"{first}{note}{last} and then", [NOTED, " and then"]),
        (f"{first}{whole}{last}", [ADDED]),
        (f"{first}{dsml('now', '{}')}{last}", [("now", {})]),
        (f"{first}{dsml('note', json.dumps({'text': odd}))}{last}", [("note", {"text": odd})]),
        (f"{first}{dsml('add', json.dumps({'a': None, 'b': [{}]}))}{last}", [("add", {"a": None, "b": [{}]})]),
        (f"{first}{add[:-3]}{add}{last}", [f"{first}{add[:-3]}", ADDED]),
        *((f"x{first}{call}", [f"x{first}{call}"]) for call in broken),
    ]


FORMS: dict[type[ToolCallParser], list[tuple[str, list[Any]]]] = {
    DeepSeekV3Parser: [
        *json_forms(v3, CALLS, ENDS),
        (f"a {CALLS} b {ENDS} c", [f"a {CALLS} b {ENDS} c"]),
        (f"{CALL}add{SEP}{ADD}{END}", [f"{CALL}add{SEP}{ADD}{END}"]),
    ],
    DeepSeekV31Parser: [*json_forms(v31, CALLS, ENDS), (f"{v31('add', ADD)}", [ADDED])],
    **{parser: dsml_forms(block) for parser, block in
       ((DeepSeekV32Parser, "function_calls"), (DeepSeekV4Parser, "tool_calls"))},
    Qwen25Parser: [
        *json_forms(qwen),
        ('<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
        *((reply, [reply]) for body in ('{"name": 5}', '{"name": "now", "arguments": 5}', '{"arguments": {}}')
          for reply in [f"<tool_call>{body}</tool_call>"]),
        ("<tool_call></tool_call>", ["<tool_call></tool_call>"]),
        (r'<tool_call>{"name": "note", "arguments": {"text": "\ud800"}}</tool_call>', [("note", {"text": "\ud800"})]),
    ],
    Qwen3CoderParser: [
        (f"Yes.\n{coder('add', a=1, b='2.5', exact='True')}", ["Yes.", ("add", {"a": 1, "b": 2.5, "exact": True})]),
        (coder("add", a="one", b="null", exact="1"), [("add", {"a": "one", "b": None, "exact": "1"})]),
        (coder("add", a="true", b="NaN"), [("add", {"a": "true", "b": "NaN"})]),
        (coder("add", a=1, b="-1e999"), [("add", {"a": 1, "b": "-1e999"})]),
        (coder("note", text="5", tags='["x", "ü"]'), [("note", {"text": "5", "tags": ["x", "ü"]})]),
        (
            coder("note", text="\n two\n <parameter=x> </parameter> lines \n", tags="None", other="{}"),
            [("note", {"text": "\n two\n <parameter=x> </parameter> lines \n", "tags": None, "other": "{}"})],
        ),
        (coder("now") + coder("now"), [("now", {}), ("now", {})]),
        ("<tool_call><function=now></function></tool_call>", [("now", {})]),
        *((reply, [reply]) for reply in (coder("rm", x=1), "<tool_call>\n<function=now>x</function></tool_call>",
          coder("add", a=1)[:-5], "<tool_call><function=add><parameter=a>1</function></tool_call>", "a < b <tool_",
          " ")),
    ],
}  # fmt: skip


def read_calls(parser_type: type[ToolCallParser], pieces: Sequence[str], **options: Any) -> list[Any]:
    """The events with neighbouring texts joined, and arguments as values; each can be sent."""
    parser = parser_type(TOOLS, **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined: list[Any] = []
    for _, group in itertools.groupby(events, lambda event: isinstance(event, str)):
        texts: list[str] = []
        calls: list[Any] = []
        for event in group:
            if isinstance(event, str):
                texts.append(event)
            else:
                calls.append((event.name, json_value(event.arguments)))
        joined += calls or ["".join(texts)]
    for event in events:
        if isinstance(event, ToolCall):
            event.arguments.encode()
    return joined


def read_thought(thinks: bool | None, pieces: Sequence[str]) -> tuple[str, str, list[str]]:
    """Thought, answer, and the order in which both came, without empty pieces."""
    parser = ReasoningParser(thinks)
    thoughts, answers, order = "", "", []
    for thought, answer in (*map(parser.feed, pieces), parser.finish()):
        thoughts, answers = thoughts + thought, answers + answer
        order += ["thought"] * bool(thought) + ["answer"] * bool(answer)
    return thoughts, answers, [kind for kind, _ in itertools.groupby(order)]


def cuts(text: str, number: int, chance: random.Random) -> Iterator[list[str]]:
    """``text`` in two at every place, in characters, and ``number`` times at random."""
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]
    yield list(text)
    for _ in range(number):
        places = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(1, 13)))
        yield [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
