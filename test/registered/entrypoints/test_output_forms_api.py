"""Constrained output over HTTP: every spelling reaches the scheduler as one grammar; an impossible one is a 400."""

import asyncio
import json
import unittest
from unittest import mock

import httpx
import msgspec
from pydantic import BaseModel

from sglang.srt.constrained.grammar_checker import CheckerError
from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.entrypoints.openai.output_form import output_form
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.request_input import RequestError
from sglang.srt.parser.tool_call_parser import JSON_WHITE_SPACE
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS
from sglang.test.chat_server import ChatServerCase
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
ENDLESS = {"type": "integer", "multipleOf": 99_999_999}
FORMATS = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
WHITE_SPACE = {"whitespace_pattern": JSON_WHITE_SPACE}
# Fields of a body, the sampling parameter that they stand for, and its value.
SPELLINGS = (
    ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
    ({"response_format": FORMATS}, "json_schema", SCHEMA),
    ({"response_format": TAG}, "structural_tag", TAG),
    ({"regex": "a+"}, "regex", "a+"),
    ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
    ({"json_schema": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
    ({"structural_tag": TAG}, "structural_tag", TAG),
    ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["ja", 'n"ö']}, "ebnf", 'start: CHOICE\nCHOICE: "ja" | "n\\"ö"'),
    ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
    ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
    ({"structured_outputs": {"choice": ["x"]}}, "ebnf", 'start: CHOICE\nCHOICE: "x"'),
)


class FormCase(ChatServerCase):
    def chat(self, **fields):
        """What the scheduler received."""
        named = {key: fields.pop(key) for key in ("response_format", "tools", "tool_choice") if key in fields}
        self.client.chat.completions.create(
            model="default", messages=HI, max_tokens=4, **named, extra_body=fields, temperature=0
        )
        return self.fake.scheduler.received[-1]

    def refused(self, path, body):
        reply = httpx.post(self.fake.url + path, json=body, timeout=120)
        self.assertEqual(reply.status_code, 400, (body, reply.text))
        return reply.json()["message"]


class TestForms(FormCase):
    def test_spellings(self):
        for fields, kind, value in SPELLINGS:
            source = value if isinstance(value, str) else json.dumps(value)
            want = grammar_of(kind, source, WHITE_SPACE)
            for path, prompt in (("chat", None), ("completions", "a"), ("generate", "a")):
                if path == "chat":
                    got = self.chat(**fields)
                elif path == "completions":
                    self.client.completions.create(model="default", prompt="a", max_tokens=2, extra_body=fields)
                    got = self.fake.scheduler.received[-1]
                else:
                    body = {"text": prompt, "sampling_params": {kind: value, "max_new_tokens": 2}}
                    self.assertEqual(httpx.post(f"{self.fake.url}/generate", json=body).status_code, 200)
                    got = self.fake.scheduler.received[-1]
                self.assertEqual((got.grammar, got.grammar_after), (want, None), (path, fields))
        self.assertIsNone(self.chat(response_format={"type": "text"}).grammar)
        self.assertIsNone(self.chat(guided_choice=None, structured_outputs={}).grammar)

    def test_several_prompts_and_samples(self):
        self.fake.scheduler.received.clear()
        body = {
            "text": ["a", "b"],
            "sampling_params": [{"regex": "x", "n": 2, "max_new_tokens": 1}, {"max_new_tokens": 1}],
        }
        self.assertEqual(httpx.post(f"{self.fake.url}/generate", json=body).status_code, 200)
        grammars = [message.grammar for message in self.fake.scheduler.received]
        self.assertEqual(grammars, [grammar_of("regex", "x", {})] * 2 + [None])

    def test_pydantic(self):
        class Answer(BaseModel):
            value: int
            words: list[str] | None = None

        self.say('{"value": 5, "words": ["é"]}')
        answer = self.client.chat.completions.parse(model="default", messages=HI, response_format=Answer)
        self.assertEqual(answer.choices[0].message.parsed, Answer(value=5, words=["é"]))

    def test_what_is_malformed_is_named(self):
        chat, generate = "/v1/chat/completions", "/generate"
        for path, fields, said in (
            (chat, {"response_format": {"type": "xml"}}, "'xml'"),
            (chat, {"response_format": {"type": "json_schema"}}, "json_schema.schema"),
            (chat, {"response_format": FORMATS, "regex": "a"}, "exclude"),
            (chat, {"guided_json": SCHEMA, "json_schema": SCHEMA}, "exclude"),
            (chat, {"guided_choice": []}, "guided_choice"),
            (chat, {"guided_choice": ["a", ""]}, "guided_choice"),
            (chat, {"structured_outputs": {"regex": "a", "json": {}}}, "holds one of"),
            (chat, {"structured_outputs": {"whitespace_pattern": "a"}}, "holds one of"),
            (chat, {"regex": "(?=a)"}, "look-ahead"),
            (chat, {"json_schema": {"type": "objekt"}}, "objekt"),
            (generate, {"sampling_params": {"regex": "a", "ebnf": "b"}}, "exclude"),
            (generate, {"sampling_params": {"regex": ["a"]}}, "regex"),
            (generate, {"sampling_params": {"regex": "a" * 300_000}}, "at most 262144"),
            (generate, {"regex": "a"}, "in sampling_params"),
            (generate, {"sampling_params": {"guided_json": {}}}, "in sampling_params"),
        ):
            base = {"text": "a"} if path == generate else {"messages": HI}
            self.assertIn(said, self.refused(path, {**base, **fields}), fields)
        self.fake.until(lambda: self.fake.context.manager.admission.num_requests == 0)

    def test_a_hostile_one_harms_nobody(self):
        """It is compiled outside the event loop; requests without a grammar continue, and the result is cached."""

        async def both():
            async with httpx.AsyncClient(base_url=self.fake.url, timeout=120) as client:
                bad = {"text": "a", "sampling_params": {"json_schema": json.dumps(ENDLESS)}}
                hostile = asyncio.create_task(client.post("/generate", json=bad))
                await asyncio.sleep(0.3)
                for _ in range(5):
                    good = await client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}})
                    self.assertEqual(good.status_code, 200)
                self.assertFalse(hostile.done())
                return [await hostile, await client.post("/generate", json=bad)]

        checker = self.fake.context.manager._grammars._checker
        with mock.patch.object(checker, "check", wraps=checker.check) as check:
            for reply in asyncio.run(both()):
                self.assertEqual(reply.status_code, 400)
                self.assertIn("takes more than 2 s", reply.json()["message"])
        self.assertEqual(check.call_count, 1)
        self.assertIsNotNone(self.chat(regex="ab").grammar)

    def test_a_checker_that_is_killed_refuses_no_grammar_for_good(self):
        checker = self.fake.context.manager._grammars._checker
        url, body = f"{self.fake.url}/generate", {"text": "a", "sampling_params": {"regex": "abd", "max_new_tokens": 1}}
        with mock.patch.object(checker, "check", side_effect=CheckerError("it was killed")):
            reply = httpx.post(url, json=body)
        self.assertEqual((reply.status_code, reply.headers["retry-after"]), (503, "5"))
        self.assertIn("regex cannot be checked now: it was killed", reply.json()["message"])
        self.assertEqual(httpx.post(url, json=body).status_code, 200)


class TestThoughtsAndTools(FormCase):
    def test_the_form_begins_behind_a_thought(self):
        end = self.fake.tokenizer.token_id("</think>")
        ids = self.fake.tokenizer.encode("hi<think>\n", add_special_tokens=False)
        self.assertEqual(self.chat(regex="a", input_ids=ids).grammar_after, end)
        self.assertEqual(self.chat(regex="a", input_ids=ids, separate_reasoning=False).grammar_after, end)
        self.assertIsNone(self.chat(input_ids=ids).grammar_after)
        self.assertIsNone(self.chat(regex="a", chat_template_kwargs={"enable_thinking": False}).grammar_after)
        body = {"text": "a", "sampling_params": {"regex": "a", "max_new_tokens": 1}, "require_reasoning": True}
        self.assertEqual(httpx.post(f"{self.fake.url}/generate", json=body).status_code, 200)
        self.assertEqual(self.fake.scheduler.received[-1].grammar_after, end)

    def test_calls_that_must_be(self):
        parser, token_id = TOOL_CALL_PARSERS["qwen25"], self.fake.tokenizer.token_id

        def form(tools, most, answer=None):
            return grammar_of("ebnf", parser.grammar(tools, most, token_id, answer), {})

        tools, one = {"add": SCHEMA, "now": {}}, {"type": "function", "function": {"name": "now"}}
        self.assertEqual(self.chat(tools=[ADD, NOW], tool_choice="required").grammar, form(tools, None))
        once = self.chat(tools=[ADD, NOW], tool_choice="required", parallel_tool_calls=False)
        self.assertEqual(once.grammar, form(tools, 1))
        named = self.chat(tools=[ADD, NOW], tool_choice=one)
        self.assertEqual(named.grammar, form({"now": {}}, 1))
        self.assertIn("add", self.fake.tokenizer.decode(named.input_ids))
        either = self.chat(tools=[ADD, NOW], response_format=FORMATS)
        self.assertEqual(either.grammar, form(tools, None, SCHEMA))
        for text in ({"json_schema": json.dumps(SCHEMA)}, {"structured_outputs": {"json": json.dumps(SCHEMA)}}):
            self.assertEqual(self.chat(tools=[ADD, NOW], **text).grammar, form(tools, None, SCHEMA))
        for text, reason in (("{", "not valid JSON"), ("null", "must be an object"), ("[" * 10**5, "not valid JSON")):
            body = {"model": "default", "messages": HI, "tools": [ADD], "guided_json": text}
            self.assertIn(reason, self.refused("/v1/chat/completions", body))
        self.assertEqual(
            self.chat(tools=[ADD], tool_choice="none", response_format=FORMATS).grammar,
            grammar_of("json_schema", json.dumps(SCHEMA), WHITE_SPACE),
        )
        self.assertIsNone(self.chat(tools=[ADD, NOW]).grammar)


class TestWhiteSpace(FormCase):
    settings = {**FormCase.settings, "constrained_json_disable_any_whitespace": True}

    def test_the_setting_holds_for_a_reply_that_may_be_a_call(self):
        for fields in ({}, {"tools": [ADD]}):
            grammar = self.chat(response_format=FORMATS, **fields).grammar
            self.assertIn('"whitespace_flexible":false', grammar.replace(" ", ""))


class TestWithout(CustomTestCase):
    def refusal(self, **settings):
        fake = FakeServer(**settings).wait_ready()
        try:
            body = {"input_ids": [5], "sampling_params": {"regex": "a"}}
            reply = httpx.post(f"{fake.url}/generate", json=body)
            self.assertEqual(reply.status_code, 400)
            return reply.json()["message"]
        finally:
            fake.stop()

    def test_servers_that_give_no_form(self):
        self.assertIn("--grammar-backend none", self.refusal(grammar_backend="none"))
        self.assertIn("--skip-tokenizer-init", self.refusal(skip_tokenizer_init=True))


class TestTable(CustomTestCase):
    def test_no_form_is_none(self):
        self.assertEqual(output_form(msgspec.convert({"messages": HI}, ChatCompletionRequest)), {})
        with self.assertRaises(RequestError):
            output_form(msgspec.convert({"messages": HI, "regex": "a", "ebnf": "b"}, ChatCompletionRequest))


if __name__ == "__main__":
    unittest.main()
