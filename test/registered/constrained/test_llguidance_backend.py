"""What grammars allow: random outputs against jsonschema and re, masks against lists of all members, tool calls."""

import json
import random
import re
import tempfile
import unittest

import jsonschema
import msgspec
from tokenizers import AddedToken

from sglang.srt.constrained.llguidance_backend import GrammarError, GuidanceBackend, grammar_of
from sglang.srt.entrypoints.openai.output_form import output_form
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.tool_call_parser import ToolCall
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.parser.tool_calls.deepseekv32 import MARK
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.grammar_walks import allowed_ids, random_schema, walk
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

PADDING = 45


class GrammarCase(CustomTestCase):
    marked = {}  # by tool call form, the marks that are tokens

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        tokenizer = byte_level_tokenizer()
        marks = [mark for marks in cls.marked.values() for mark in marks]
        tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
        cls.tokenizer = Tokenizer.from_path(write_tokenizer(folder, tokenizer))
        cls.eos = [cls.tokenizer.token_id("</s>"), cls.tokenizer.token_id("<|pad|>")]
        cls.vocab_size = cls.tokenizer.vocab_size + PADDING
        cls.backend = GuidanceBackend(cls.tokenizer.to_json(), cls.vocab_size, cls.eos)
        cls.space = cls.tokenizer.encode("\t", add_special_tokens=False)[0]
        closing = ('"', "}", "]", ",", ":", "\n", "1")
        cls.liked = frozenset(cls.tokenizer.encode(text, add_special_tokens=False)[0] for text in closing)

    def compiled(self, kind, source, **options):
        return self.backend.compile(grammar_of(kind, source, options))

    def walk(self, grammar, chance):
        self.ids = ids = walk(self.backend, grammar.copy(None), self.eos, chance, self.liked)
        return None if ids is None else self.tokenizer.decode(ids, skip_special_tokens=False)


class TestJsonSchema(GrammarCase):
    def test_every_output_follows_its_schema(self):
        chance = random.Random(5)
        finished = 0
        for number in range(60):
            schema = random_schema(chance)
            grammar = self.compiled("json_schema", json.dumps(schema), whitespace_flexible=number % 4 == 0)
            for _ in range(3):
                text = self.walk(grammar, chance)
                if text is not None:
                    finished += 1
                    jsonschema.validate(json.loads(text), schema)
        self.assertGreater(finished, 150)

    def test_white_space(self):
        grammar = self.compiled("json_schema", '{"const": [1, 2]}', whitespace_flexible=False)
        self.assertEqual(self.walk(grammar, random.Random(0)), "[1,2]")
        grammar = self.compiled("json_schema", '{"const": [1, 2]}', whitespace_pattern="[ ]{3}")
        self.assertEqual(re.sub("   ", "", self.walk(grammar, random.Random(0))), "[1,2]")

    def test_what_cannot_be_held_is_refused(self):
        for kind, source, reason in (
            ("json_schema", "{", "line 1"),
            ("json_schema", "[1]", "object"),
            ("json_schema", '{"type": "objekt"}', "objekt"),
            ("json_schema", '{"uniqueItems": true, "type": "array"}', "uniqueItems"),
            ("json_schema", '{"$ref": "http://x.y/z"}', "x.y"),
            ("json_schema", '{"minimum": 5, "maximum": 1, "type": "integer"}', "minimum"),
            ("json_schema", '{"$ref": "#"}', ""),
            ("json_schema", '{"properties": {"a": ' * 300 + "{}" + "}}" * 300, "recursion"),
            ("json_schema", '"\ud800"', ""),
            ("regex", "(a", "regex"),
            ("regex", "(?=a)b", "look"),
            ("ebnf", "root ::= (", ""),
            ("ebnf", "start: nothing", "nothing"),
            ("ebnf", "", ""),
            ("structural_tag", '{"structures": [], "triggers": []}', "empty"),
            (
                "structural_tag",
                '{"structures": [{"begin": "b", "end": ""}], "triggers": ["<a"]}',
                "any of the triggers",
            ),
            ("structural_tag", "{}", "missing required field `triggers`"),
            ("structural_tag", "5", "Expected `object`"),
            (
                "structural_tag",
                '{"structures": [{"begin": "<a"}], "triggers": ["<a"]}',
                r"`end` - at `\$.structures\[0",
            ),
            ("structural_tag", '{"structures": [{"begin": "<a", "end": ""}], "triggers": "<a"}', "Expected `array`"),
        ):
            with self.assertRaisesRegex(GrammarError, reason, msg=source[:80]):
                self.compiled(kind, source)


class TestMasks(GrammarCase):
    LANGUAGES = (
        ("regex", "(foo|fo|é€|😀)(!{1,2})?", [a + b for a in ("foo", "fo", "é€", "😀") for b in ("", "!", "!!")]),
        ("ebnf", 'root ::= "The" [ ]? ("quick" | "q")', ["Thequick", "The quick", "Theq", "The q"]),
        ("ebnf", 'start: "a" b?\nb: "<tool call>" | /[01]/', ["a", "a<tool call>", "a0", "a1"]),
        ("regex", "", [""]),
    )

    def test_a_list_of_choices_may_be_long(self):
        choices = [*(f"choice {number}" for number in range(6000)), "choice", 'é"\\\n']
        body = msgspec.convert({"messages": [], "guided_choice": choices}, ChatCompletionRequest)
        grammar = self.compiled(*output_form(body).popitem())
        for text in choices[1:6000:999] + choices[-2:]:
            one = grammar.copy(None)
            one.follow(self.tokenizer.encode(text, add_special_tokens=False))
            self.assertEqual((one.error, one.matcher.is_accepting()), ("", True), text)

    def test_exactly_what_leads_to_a_member_is_allowed(self):
        """At every prefix that tokens can spell, over all tokens, by comparison with all members."""
        spelled = [self.tokenizer.token_bytes(i) for i in range(self.tokenizer.vocab_size)]
        added = {*self.tokenizer.all_special_ids, self.tokenizer.token_id("<tool call>")}
        for kind, source, members in self.LANGUAGES:
            grammar = self.compiled(kind, source)
            wanted = [member.encode() for member in members]
            paths, seen = [[]], {b""}
            while paths:
                path = paths.pop()
                prefix = b"".join(spelled[i] for i in path)
                state = grammar.copy(None)
                state.follow(path)
                leads = {
                    i
                    for i, text in enumerate(spelled)
                    if text and i not in added and any(member.startswith(prefix + text) for member in wanted)
                }
                ends = set(self.eos) if prefix in wanted else set()
                allowed = set(allowed_ids(self.backend, state))
                left = [member[len(prefix) :] for member in wanted if member.startswith(prefix)]
                if not ends and len({member[:1] for member in left}) == 1:  # the tokenizer's own spelling of it
                    self.assertTrue(allowed and allowed <= leads, (source, prefix))
                else:
                    self.assertEqual(allowed, leads | ends, (source, prefix))
                if path:
                    self.assertEqual(state.is_complete, not leads, (source, prefix))
                for i in leads:
                    if prefix + spelled[i] not in seen:
                        seen.add(prefix + spelled[i])
                        paths.append([*path, i])
            self.assertGreaterEqual(len(seen), len(members))

    def test_forced_text_that_reads_as_a_special_token_is_spelled_as_text(self):
        chance = random.Random(6)
        for source in ("x<tool call>y", "<tool call><tool call>", "<tool call> (</s>|z)", "é<s>"):
            said = source.replace("(</s>|z)", "</s>"), source.replace("(</s>|z)", "z")
            for kind, text in (
                ("ebnf", f"start: {json.dumps(source)}"),
                ("json_schema", json.dumps({"const": source})),
            ):
                want = (source,) if kind == "ebnf" else (json.dumps(source, ensure_ascii=False),)
                self.assertIn(self.walk(self.compiled(kind, text), chance), want)
                self.assertFalse(
                    set(self.ids) & {*self.tokenizer.all_special_ids, self.tokenizer.token_id("<tool call>")}
                )
            self.assertIn(self.walk(self.compiled("regex", source), chance), said)

    def test_regular_expressions(self):
        chance = random.Random(1)
        for source in (
            r"[a-z]+@[a-z]{2,5}\.(org|com)",
            r"\d{1,3}(,\d{3})*",
            "(?i)yes|no",
            r"[^\x00-\x7f]{2}x",
            "a|ab|abc",
        ):
            for _ in range(5):
                text = self.walk(self.compiled("regex", source), chance)
                self.assertTrue(text is None or re.fullmatch(source, text), (source, text))

    def test_it_holds_behind_a_token(self):
        mark = self.tokenizer.token_id("<tool call>")
        grammar = self.compiled("regex", "ab").copy(mark)
        output = self.tokenizer.encode("no form yet", add_special_tokens=False)
        grammar.follow(output)
        self.assertTrue(grammar.is_waiting and not grammar.is_complete and not grammar.error)
        grammar.follow([*output, mark, *self.tokenizer.encode("a", add_special_tokens=False)])
        allowed = {self.tokenizer.decode([i], skip_special_tokens=False) for i in allowed_ids(self.backend, grammar)}
        self.assertEqual(allowed, {"b"})

    def test_white_space_of_a_structural_tag_has_a_bound(self):
        tag = {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": ""}], "triggers": ["<f"]}
        grammar = self.compiled("structural_tag", json.dumps(tag), whitespace_pattern="[ ]{1,3}")
        for count, fits in ((3, True), (4, False)):
            state = grammar.copy(None)
            state.follow(self.tokenizer.encode("<f>{" + " " * count, add_special_tokens=False))
            self.assertEqual(not state.error, fits)

    def test_a_structural_tag_holds_between_its_marks(self):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        tag = {"structures": [{"begin": "<f=x>", "schema": schema, "end": "</f>"}], "triggers": ["<f"]}
        grammar = self.compiled("structural_tag", json.dumps(tag))
        for text, good in (("free < text", True), ('t <f=x>{"a":5}</f> t', True), ("<f=y", False), ("<f=x>5", False)):
            state = grammar.copy(None)
            state.follow(self.tokenizer.encode(text, add_special_tokens=False))
            self.assertEqual(not state.error, good, text)


class TestToolCalls(GrammarCase):
    PARAMETERS = {
        "type": "object",
        "properties": {
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["x", 'é" y'], "type": "string"},
            "note": {"type": "string", "maxLength": 3},
            "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
        },
        "$defs": {"flag": {"type": "boolean"}},
        "required": ["count", "kind"],
        "additionalProperties": False,
    }
    TOOLS = {"add": PARAMETERS, 'odd "name"': {"properties": {"a": {"const": 1}}, "additionalProperties": False}}

    def test_every_reply_is_calls_that_the_parser_reads(self):
        chance = random.Random(2)
        for name, parser in TOOL_CALL_PARSERS.items():
            many = self.compiled("ebnf", parser.grammar(self.TOOLS, None, self.tokenizer.token_id))
            one = self.compiled("ebnf", parser.grammar({"add": self.PARAMETERS}, 1, self.tokenizer.token_id))
            finished = 0
            for number in range(24):
                text = self.walk(one if number % 2 else many, chance)
                if text is None:
                    continue
                finished += 1
                reader = parser(self.TOOLS)
                events = reader.feed(text) + reader.finish()
                self.assertTrue(events and all(isinstance(event, ToolCall) for event in events), (name, text, events))
                self.assertTrue(len(events) == 1 or number % 2 == 0, (name, text))
                for call in events:
                    arguments = json.loads(call.arguments)
                    if name not in ("qwen25", "deepseekv3", "deepseekv31"):
                        arguments.pop("note", None)  # strings stand bare, and their schema is not held
                    jsonschema.validate(arguments, self.TOOLS[call.name])
                for mark in self.marked.get(name, ()):
                    self.assertIn(self.tokenizer.token_id(mark), self.ids)
            self.assertGreater(finished, 12, name)

    def test_bare_text_may_hold_what_looks_like_its_end(self):
        text = "a </b> </parameter\n <x> é"
        head, tail = f'<{MARK}invoke name="say">\n<{MARK}parameter name="t" string="true">', f"</{MARK}parameter>\n"
        for name, block in (("deepseekv32", "function_calls"), ("deepseekv4", "tool_calls")):
            first, last = f"\n\n<{MARK}{block}>\n", f"</{MARK}invoke>\n</{MARK}{block}>"
            parser = TOOL_CALL_PARSERS[name]
            tools = {"say": {"properties": {"t": {"type": "string"}}, "required": ["t"]}}
            grammar = self.compiled("ebnf", parser.grammar(tools, 1, self.tokenizer.token_id))
            for said, whole in ((f"{first}{head}{text}{tail}{last}", True), (f"{first}{head}{text}{last}", False)):
                state = grammar.copy(None)
                state.follow(self.tokenizer.encode(said, add_special_tokens=False))
                self.assertEqual(state.is_complete and not state.error, whole, said)
            reader = parser(tools)
            (call,) = reader.feed(f"{first}{head}{text}{tail}{last}") + reader.finish()
            self.assertEqual(json.loads(call.arguments), {"t": text})

    def test_a_value_follows_what_its_schema_refers_to(self):
        points = {"type": "array", "items": {"type": "integer"}}
        colors = {"enum": ["red", "blue"], "type": "string"}
        parser = TOOL_CALL_PARSERS["qwen3_coder"]
        for part, value, fits in (
            (points, "[1]", True),
            (points, "one", False),
            (colors, "red", True),
            (colors, "x", False),
        ):
            tools = {"f": {"properties": {"p": {"$ref": "#/$defs/part"}}, "required": ["p"], "$defs": {"part": part}}}
            state = self.compiled("ebnf", parser.grammar(tools, 1, self.tokenizer.token_id)).copy(None)
            said = f"<tool_call>\n<function=f>\n<parameter=p>\n{value}\n</parameter>\n</function>\n</tool_call>"
            state.follow(self.tokenizer.encode(said, add_special_tokens=False))
            self.assertEqual(state.is_complete and not state.error, fits, (part, value, state.error))

    def test_white_space_has_a_bound(self):
        chance = random.Random(4)
        for name in ("qwen25", "deepseekv3", "deepseekv31"):
            parser = TOOL_CALL_PARSERS[name]
            grammar = self.compiled("ebnf", parser.grammar({"add": self.PARAMETERS}, 1, self.tokenizer.token_id))
            whole = None
            while whole is None:
                whole = self.walk(grammar, chance)
            opened = whole[: whole.index("{", whole.index("{") + 1 if name == "qwen25" else 0) + 1]
            for count, fits in ((40, True), (41, False)):
                state = grammar.copy(None)
                state.follow([*self.tokenizer.encode(opened, add_special_tokens=False), *[self.space] * count])
                self.assertEqual(not state.error, fits, (name, count, state.error))

    def test_a_call_or_an_answer(self):
        chance = random.Random(3)
        answer = {"type": "object", "properties": {"v": {"const": 1}}, "required": ["v"], "additionalProperties": False}
        for name, parser in TOOL_CALL_PARSERS.items():
            grammar = self.compiled(
                "ebnf", parser.grammar({"add": self.PARAMETERS}, None, self.tokenizer.token_id, answer)
            )
            texts = [self.walk(grammar, chance) for _ in range(30)]
            kinds = {text.lstrip().startswith("{") for text in texts if text is not None}
            self.assertEqual(kinds, {True, False}, name)


class TestToolCallsWithTokens(TestToolCalls):
    """The same where marks are tokens, which are then said as such."""

    marked = {
        **{name: TOOL_CALL_PARSERS[name].all_marks() for name in ("qwen25", "deepseekv31", "qwen3_coder")},
        **dict.fromkeys(("deepseekv32", "deepseekv4"), (MARK,)),
    }


if __name__ == "__main__":
    unittest.main()
