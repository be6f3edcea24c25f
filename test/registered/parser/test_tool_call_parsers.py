"""Tool calls in all forms: every cut of a reply gives the same events, and what is no call stays text."""

import json
import random
import unittest
from enum import Enum, IntEnum
from unittest import mock

from pydantic import BaseModel

from sglang.srt.parser.tool_call_parser import schema_types
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.parser.tool_calls.deepseekv3 import DeepSeekV3Parser
from sglang.srt.parser.tool_calls.deepseekv31 import DeepSeekV31Parser
from sglang.srt.parser.tool_calls.deepseekv32 import DeepSeekV32Parser
from sglang.srt.parser.tool_calls.qwen3_coder import Qwen3CoderParser
from sglang.srt.parser.tool_calls.qwen25 import Qwen25Parser
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.parser_cases import (
    ADD,
    ADDED,
    CALLS,
    FORMS,
    MARK,
    NOTE,
    TOOLS,
    coder,
    cuts,
    dsml,
    qwen,
    read_calls,
    v3,
    v31,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")


class TestToolCallParsers(CustomTestCase):
    def test_every_form_is_here(self):
        self.assertEqual(set(FORMS), set(TOOL_CALL_PARSERS.values()))

    def test_every_cut_gives_the_same_events(self):
        chance = random.Random(7)
        for parser, replies in FORMS.items():
            for reply, events in replies:
                self.assertEqual(read_calls(parser, [reply]), events, (parser, reply))
                for pieces in cuts(reply, 100, chance):
                    self.assertEqual(read_calls(parser, pieces), events, (parser, pieces))

    def test_text_is_not_kept_back(self):
        for parser_type in FORMS:
            parser = parser_type(TOOLS)
            self.assertEqual(parser.feed("Some text"), ["Some text"])
            self.assertEqual(parser.feed(" more <"), [" more"])
            self.assertEqual(parser.feed("b> "), [" <b>"])

    def test_calls_that_are_not_wanted_stay_text(self):
        reply = qwen("add", ADD) + "\n" + qwen("note", NOTE)
        self.assertEqual(read_calls(Qwen25Parser, [reply], max_calls=1), [ADDED, "\n" + qwen("note", NOTE)])

    def test_a_string_of_json_may_contain_the_marks_of_calls(self):
        chance = random.Random(8)
        for parser, call in ((Qwen25Parser, qwen), (DeepSeekV3Parser, v3), (DeepSeekV31Parser, v31)):
            for text in (f"a {parser.end} b", f'{parser.end}{parser.start}\\\n"{parser.end}', f"{parser.end} {{" * 9):
                arguments = json.dumps({"text": text}, ensure_ascii=False)
                reply = f"I say {call('note', arguments)}\n{call('add', ADD)}"
                for pieces in ([reply], *cuts(reply, 20, chance)):
                    self.assertEqual(read_calls(parser, pieces), ["I say", ("note", {"text": text}), ADDED], text)
            # A string that does not end is in no call, and hides none.
            cut = call("note", '{"text": "a')
            for pieces in ([cut, call("add", ADD)], *cuts(cut + call("add", ADD), 20, chance)):
                self.assertEqual(read_calls(parser, pieces), [cut, ADDED])
            self.assertEqual(read_calls(parser, [cut]), [cut])
            endless = cut + parser.end * 2000
            self.assertEqual(read_calls(parser, [endless]), [endless])

    def test_a_call_is_not_decoded_at_each_mark_of_a_string(self):
        arguments = json.dumps({"text": Qwen25Parser.end * 30, "b": 'a\\"' + Qwen25Parser.end})
        with mock.patch.object(Qwen25Parser, "read_call", autospec=True, side_effect=Qwen25Parser.read_call) as read:
            (call,) = read_calls(Qwen25Parser, list(qwen("note", arguments)))
        self.assertEqual(call, ("note", json.loads(arguments)))
        self.assertEqual(read.call_count, 3)  # at the first mark of each string, and at the end

    def test_values_have_the_types_that_references_lead_to(self):
        """Nested models and enumerations of pydantic stand in ``$defs``: their values came as strings."""

        class Point(BaseModel):
            x: int

        class Level(IntEnum):
            LOW = 1

        class Color(Enum):
            SEVEN = "7"

        class Arguments(BaseModel):
            point: Point
            level: Level
            color: Color
            maybe: Point | None
            either: Level | Color
            points: list[Point]

        tools = {"draw": Arguments.model_json_schema()}
        said = {"point": '{"x": 1}', "level": "1", "color": "7", "maybe": '{"x": 2}', "either": "7", "points": "[]"}
        (call,) = Qwen3CoderParser(tools).feed(coder("draw", **said))
        name, arguments = call.name, json.loads(call.arguments)
        wanted = {"point": {"x": 1}, "level": 1, "color": "7", "maybe": {"x": 2}, "either": "7", "points": []}
        self.assertEqual((name, arguments), ("draw", wanted))
        Arguments.model_validate(arguments, strict=False)
        (call,) = Qwen3CoderParser(tools).feed(coder("draw", **{**said, "maybe": "null"}))
        self.assertIsNone(json.loads(call.arguments)["maybe"])

    def test_parameters_may_be_a_reference_themselves(self):
        """As pydantic writes those of a model that contains itself."""

        class Node(BaseModel):
            size: int
            children: list["Node"]

        schema = Node.model_json_schema()
        self.assertNotIn("properties", schema)
        (call,) = Qwen3CoderParser({"grow": schema}).feed(coder("grow", size="3", children="[]"))
        self.assertEqual(json.loads(call.arguments), {"size": 3, "children": []})
        for parser in (Qwen3CoderParser, DeepSeekV32Parser):
            form = parser.grammar({"grow": schema}, 1, lambda _: None)
            self.assertTrue("size" in form and "children" in form and ")?" not in form, form)
        schema = {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
        (call,) = Qwen3CoderParser({"grow": schema}).feed(coder("grow", a="1", b="1"))
        self.assertEqual(json.loads(call.arguments), {"a": "1", "b": 1})

    def test_types_of_odd_schemas(self):
        loop = [{"$ref": "#/$defs/a"}] * 5000
        parts = {"a": {"anyOf": loop, "allOf": loop}, "b/~": {"type": "integer"}, "c": {"$ref": "#/$defs/c"}}
        for schema, types in (
            ({"$ref": "#/$defs/a"}, set()),
            ({"$ref": "#/$defs/b~1~0"}, {"integer"}),
            ({"$ref": "#/$defs/b~1~0", "type": "string"}, {"string"}),
            ({"allOf": [{"description": "x"}, {"$ref": "#/$defs/b~1~0"}]}, {"integer"}),
            ({"oneOf": [{"$ref": "#"}, {"const": None}]}, {"object", "null"}),
            *(
                ({"$ref": ref}, set())
                for ref in ("#/$defs/c", "#/$defs/d", "#/$defs/a/x", "b/~", "http://x.y", 5, None)
            ),
            *((schema, set()) for schema in (None, True, [], {"allOf": 5, "anyOf": {}, "type": {}, "enum": 5})),
        ):
            self.assertEqual(schema_types(schema, {"type": "object", "$defs": parts}), types, schema)

    def test_hostile_replies_end(self):
        deep = '{"name": "add", "arguments": ' + '{"a":' * 100_000
        tag = f'<{MARK}parameter name="a" string="true">'
        for parser, replies in {
            Qwen25Parser: (f"<tool_call>{deep}</tool_call>", "<tool_call>" * 2000 + "</tool_call>"),
            Qwen3CoderParser: (f"<tool_call><function=add>{'<parameter=a>' * 2000}</function></tool_call>",),
            DeepSeekV3Parser: (v3("add", deep), CALLS * 2000, v3("add", "\n```json\n" * 2000)),
            DeepSeekV32Parser: (
                f'<{MARK}invoke name="add">{tag * 2000}</{MARK}invoke>',
                f'<{MARK}invoke name="add">{deep[29:]}</{MARK}invoke>',
                dsml("add", ADD)[:-12] * 1000,
            ),
        }.items():
            for reply in replies:
                self.assertEqual(read_calls(parser, [reply]), [reply])


if __name__ == "__main__":
    unittest.main()
