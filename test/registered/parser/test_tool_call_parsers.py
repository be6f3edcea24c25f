"""Tool calls in four forms: every cut of a reply gives the same events, and what is no call stays text."""

import itertools
import json
import random
import unittest

from sglang.srt.parser.tool_call_parser import ToolCall
from sglang.srt.parser.tool_calls.deepseekv3 import DeepSeekV3Parser
from sglang.srt.parser.tool_calls.deepseekv31 import DeepSeekV31Parser
from sglang.srt.parser.tool_calls.qwen3_coder import Qwen3CoderParser
from sglang.srt.parser.tool_calls.qwen25 import Qwen25Parser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

TOOLS = {
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": ["number", "null"]}, "exact": {"type": "boolean"}}},
    "note": {"properties": {"text": {"type": "string"}, "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]}}},
    "now": {},
}
CALLS, CALL, SEP, END, ENDS = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)


def v3(name, arguments):
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END}"


def v31(name, arguments):
    return f"{CALL}{name}{SEP}{arguments}{END}"


def qwen(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name, **arguments):
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"


ADD, NOTE = '{"a": 1, "b": 2}', '{"text": "naïve 😀 \\"x\\" }"}'
# Events that are expected: text, or a name and the value of the arguments.
ADDED, NOTED = ("add", json.loads(ADD)), ("note", json.loads(NOTE))


def json_forms(call, first="", last=""):
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
        (f"{first}{call('now', '{}')}{last}", [("now", {})]),
    ]


FORMS = {
    DeepSeekV3Parser: [
        *json_forms(v3, CALLS, ENDS),
        (f"a {CALLS} b {ENDS} c", [f"a {CALLS} b {ENDS} c"]),
        (f"{CALL}add{SEP}{ADD}{END}", [f"{CALL}add{SEP}{ADD}{END}"]),
    ],
    DeepSeekV31Parser: [*json_forms(v31, CALLS, ENDS), (f"{v31('add', ADD)}", [ADDED])],
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


def parse(parser_type, pieces, **options):
    """The events with neighbouring texts joined, and arguments as values."""
    parser = parser_type(TOOLS, **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined = []
    for is_text, group in itertools.groupby(events, lambda event: isinstance(event, str)):
        found = list(group)
        joined += ["".join(found)] if is_text else [(call.name, json.loads(call.arguments)) for call in found]
    for event in events:
        if isinstance(event, ToolCall):
            event.arguments.encode()  # can be sent
    return joined


class TestToolCallParsers(CustomTestCase):
    def test_every_cut_gives_the_same_events(self):
        source = random.Random(7)
        for parser, replies in FORMS.items():
            for reply, events in replies:
                self.assertEqual(parse(parser, [reply]), events, (parser, reply))
                splits = [[reply[:i], reply[i:]] for i in range(len(reply))] + [list(reply)]
                for _ in range(1000):
                    places = sorted(source.choices(range(len(reply) + 1), k=source.randrange(1, 9)))
                    splits.append([reply[a:b] for a, b in itertools.pairwise([0, *places, len(reply)])])
                for pieces in splits:
                    self.assertEqual(parse(parser, pieces), events, (parser, pieces))

    def test_text_is_not_kept_back(self):
        for parser_type in FORMS:
            parser = parser_type(TOOLS)
            self.assertEqual(parser.feed("Some text"), ["Some text"])
            self.assertEqual(parser.feed(" more <"), [" more"])
            self.assertEqual(parser.feed("b> "), [" <b>"])

    def test_calls_that_are_not_wanted_stay_text(self):
        reply = qwen("add", ADD) + "\n" + qwen("note", NOTE)
        self.assertEqual(parse(Qwen25Parser, [reply], max_calls=1), [ADDED, "\n" + qwen("note", NOTE)])

    def test_hostile_replies_end(self):
        deep = '{"name": "add", "arguments": ' + '{"a":' * 100_000
        for parser, replies in {
            Qwen25Parser: (f"<tool_call>{deep}</tool_call>", "<tool_call>" * 2000 + "</tool_call>"),
            Qwen3CoderParser: (f"<tool_call><function=add>{'<parameter=a>' * 2000}</function></tool_call>",),
            DeepSeekV3Parser: (v3("add", deep), CALLS * 2000, v3("add", "\n```json\n" * 2000)),
        }.items():
            for reply in replies:
                self.assertEqual(parse(parser, [reply]), [reply])


if __name__ == "__main__":
    unittest.main()
