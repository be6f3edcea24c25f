"""Tools in the chat endpoint: shown to the model; calls whole and streamed, next to thoughts; refusals."""

import json
import unittest

import openai

from sglang.test.chat_server import ChatServerCase
from sglang.test.chat_templates import STYLES
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=9, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "27+58?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 27, "b": 58}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ADDED = ("add", {"a": 27, "b": 58})


class ToolsTestCase(ChatServerCase):
    def both(self, messages=HI, tools=(ADD, NOW), **options):
        """Content, calls and finish reason, which are the same whole and streamed."""
        options = {"model": "default", "messages": messages, "tools": list(tools), "temperature": 0, **options}
        choice = self.client.chat.completions.create(**options).choices[0]
        calls = choice.message.tool_calls or []
        self.assertEqual(len({call.id for call in calls}), len(calls))
        self.assertTrue(all(call.type == "function" and call.id.startswith("call_") for call in calls))
        found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        content, streamed, reason = "", {}, None
        for chunk in self.client.chat.completions.create(**options, stream=True):
            delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
            content += delta.content or ""
            for part in delta.tool_calls or []:
                name, arguments = streamed.get(part.index, ("", ""))
                streamed[part.index] = name + (part.function.name or ""), arguments + part.function.arguments
        self.assertEqual([(name, json.loads(text)) for name, text in streamed.values()], found)
        self.assertEqual((content, reason), (choice.message.content or "", choice.finish_reason))
        self.message = choice.message
        return choice.message.content, found, choice.finish_reason


class TestCalls(ToolsTestCase):
    def test_calls(self):
        for reply, found in (
            (CALL, (None, [ADDED], "tool_calls")),
            (f"I add.\n{CALL}\n{NOW_CALL}\n", ("I add.", [ADDED, ("now", {})], "tool_calls")),
            ("No tool is needed. ", ("No tool is needed. ", [], "stop")),
            (CALL.replace("add", "rm"), (CALL.replace("add", "rm"), [], "stop")),
            (CALL.replace('"a"', "a"), (CALL.replace('"a"', "a"), [], "stop")),
            (CALL[:-4], (CALL[:-4], [], "stop")),
        ):
            self.say(reply)
            self.assertEqual(self.both(), found, reply)
        self.assertIn('"name": "add"', self.prompt())

    def test_a_call_behind_a_thought_that_names_one(self):
        self.say(f"<think>\nI could {NOW_CALL}\n</think>\n\n{CALL}")
        self.assertEqual(self.both(), (None, [ADDED], "tool_calls"))
        self.assertEqual(self.message.reasoning_content, f"I could {NOW_CALL}")

    def test_choices_of_the_client(self):
        self.say(CALL + NOW_CALL)
        self.assertEqual(self.both(parallel_tool_calls=False), (NOW_CALL, [ADDED], "tool_calls"))
        self.assertEqual(self.both(tool_choice="auto")[1], [ADDED, ("now", {})])
        self.assertEqual(self.both(tool_choice="none"), (CALL + NOW_CALL, [], "stop"))
        self.assertNotIn('"name"', self.prompt())
        self.assertEqual(self.both(tools=[NOW]), (CALL, [("now", {})], "tool_calls"))
        self.assertEqual(self.both(max_tokens=12)[2], "length")
        reply = self.client.chat.completions.create(model="default", messages=HI, tools=[ADD, NOW], n=2)
        self.assertEqual([len(choice.message.tool_calls) for choice in reply.choices], [2, 2])

    def test_the_conversation_goes_on(self):
        self.say(CALL)
        self.both()
        call = self.message.tool_calls[0]
        answer = {"role": "tool", "tool_call_id": call.id, "content": "85"}
        self.say("It is 85.")
        turns = [*HI, self.message.model_dump(exclude_none=True), answer]
        self.assertEqual(self.both(turns), ("It is 85.", [], "stop"))
        self.assertIn("<tool_response>\n85", self.prompt())
        self.assertIn('"a": 27', self.prompt())

    def test_what_is_malformed_is_named(self):
        function = ADD["function"]
        for extra, named in (
            ({"tools": [{"type": "function"}]}, "tools[0].function"),
            ({"tools": [ADD, {"type": "function", "function": {"name": " "}}]}, "tools[1].function"),
            ({"tools": ["add"]}, "tools[0]"),
            ({"tools": [{"type": "web_search"}]}, "web_search"),
            ({"tools": [ADD, ADD]}, "second time"),
            *(
                ({"tools": [{"type": "function", "function": {"name": name}}]}, "no call could say")
                for name in ("add ", " add", "a\nb", "a>b")
            ),
            ({"tools": [{"type": "function", "function": {**function, "parameters": [1]}}]}, "parameters"),
            ({"tool_choice": "required"}, "needs tools"),
            ({"tools": [ADD], "tool_choice": "required", "extra_body": {"regex": "a"}}, "regex excludes the call"),
            ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "zip"}}}, "none of the tools"),
            ({"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}}, "function: {name: ...}"),
            ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "as an object"),
            ({"tools": [ADD], "tool_choice": "x"}, "tool_choice"),
        ):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.client.chat.completions.create(model="default", messages=HI, **extra)
            self.assertIn(named, caught.exception.body["message"])
            self.assertIn(caught.exception.param, ("tools", "tool_choice"))
        self.fake.until(lambda: self.fake.context.manager.admission.num_requests == 0)

    def test_a_strict_tool_is_taken_and_the_promise_is_not_made(self):
        self.say(CALL)
        strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
        self.assertEqual(self.both(tools=[strict])[1], [ADDED])
        reply = self.client.chat.completions.create(
            model="default", messages=HI, tools=[strict, NOW], extra_body={"return_warnings": True}
        )
        self.assertEqual(len(reply.warnings), 1)
        self.assertIn("add", reply.warnings[0])


class TestCoder(ToolsTestCase):
    settings = {"tool_call_parser": "qwen3_coder"}
    template = STYLES["qwen3"].replace("loop.index0 > ns.last", "false")

    def test_values_have_the_types_of_the_schema(self):
        tags = "<parameter=a>\n27\n</parameter>\n<parameter=b>\n58\n</parameter>\n<parameter=note>\n7\n</parameter>\n"
        self.say(f"<tool_call>\n<function=add>\n{tags}</function>\n</tool_call>")
        self.assertEqual(self.both(), (None, [("add", {"a": 27, "b": 58, "note": "7"})], "tool_calls"))


class TestWithout(ToolsTestCase):
    settings = {}

    def refusal(self, **extra):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(model="default", messages=HI, **extra)
        return caught.exception.body["message"]

    def test_without_the_flag_tools_are_refused(self):
        self.assertIn("--tool-call-parser", self.refusal(tools=[ADD]))
        self.say(CALL)
        self.assertEqual(self.both(tool_choice="none"), (CALL, [], "stop"))


class TestTemplateWithoutTools(TestWithout):
    settings = {"tool_call_parser": "qwen25"}
    template = STYLES["qwen3-coder"]

    def test_without_the_flag_tools_are_refused(self):
        self.assertIn("--chat-template", self.refusal(tools=[ADD]))


if __name__ == "__main__":
    unittest.main()
