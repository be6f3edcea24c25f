"""Prompts of DeepSeek-V3.2 and V4 against ones written by hand; whose folder gets them; what is refused, and how."""

import json
import tempfile
import unittest
from pathlib import Path

import openai
from tokenizers import AddedToken

from sglang.srt.parser.reasoning_parser import THINK_END, THINK_START
from sglang.srt.parser.tool_calls.deepseekv4 import DeepSeekV4Parser
from sglang.srt.parser.tool_calls.deepseekv32 import MARK, DeepSeekV32Parser
from sglang.srt.utils import deepseek_template
from sglang.srt.utils.chat_messages import ChatTemplateError
from sglang.srt.utils.deepseek_template import DeepSeekV4Template, DeepSeekV32Template
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.chat_server import ChatServerCase
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TOKENS = (BOS, EOS, USER, ASSISTANT, "<think>", "</think>", "｜DSML｜")
# A file as the checkpoints have one, with other sentences; it must be read and never run.
CODE = '''
bos_token: str = "<｜begin▁of▁sentence｜>"
{name} = """Call with <{{dsml_token}}x>, think in {{thinking_start_token}}..{{thinking_end_token}}:
{{tool_schemas}}
done"""
tool_output_template: str = ({result!r})
REASONING_EFFORT_MAX = (
    "Think on"
    " and on.\\n"
)
raise SystemExit("this file must not be run")
'''
V4_CODE = CODE.format(name="TOOLS_TEMPLATE", result="<tool_result>{content}</tool_result>")
V32_CODE = CODE.format(name="TOOLS_SYSTEM_TEMPLATE", result="\n<result>{content}</result>")
ADD = {"type": "function", "function": {"name": "add", "description": "a + b {é}", "parameters": {"type": "object"}}}
ADD_TEXT = '{"name": "add", "description": "a + b {é}", "parameters": {"type": "object"}}'
TOOLS_TEXT = f"\n\nCall with <｜DSML｜x>, think in <think>..</think>:\n{ADD_TEXT}\ndone"
THINKING = {"thinking": True}


def say(role: str, content: str, **more):
    return {"role": role, "content": content, **more}


def call(number: int, arguments: str):
    return {"id": f"call_{number}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def asked(*arguments: str, content=None, **more):
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [call(i, a) for i, a in enumerate(arguments)],
        **more,
    }


def result(number: int, content: str):
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


def constants(code: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoding.py")
        file.write_text(code, encoding="utf-8")
        return deepseek_template._constants(file)


V4, V32 = DeepSeekV4Template(constants(V4_CODE)), DeepSeekV32Template(constants(V32_CODE))
TURNS = [say("system", "Be brief."), say("user", "1+1?"), say("assistant", "2", reasoning_content="easy"),
         say("user", "2+2?")]  # fmt: skip


class TestPrompts(CustomTestCase):
    def check(self, template, messages, expected, tools=None, **options):
        self.assertEqual(template.render(messages, tools=tools, **options), BOS + expected)

    def test_plain_turns_are_alike_in_both(self):
        for template in (V4, V32):
            past = f"Be brief.{USER}1+1?{ASSISTANT}</think>2{EOS}{USER}2+2?{ASSISTANT}"
            self.check(template, TURNS, past + "</think>")
            for variables in ({}, {"thinking": False}, {"enable_thinking": False}, {"reasoning_effort": "medium"}):
                self.check(template, TURNS, past + "</think>", variables=variables)
            # The thought of a turn that is over is left out.
            for variables in (THINKING, {"enable_thinking": True}, {**THINKING, "reasoning_effort": "high"}):
                self.check(template, TURNS, past + "<think>", variables=variables)
            self.check(template, [say("developer", "Be brief."), say("user", "x")],
                       f"Be brief.{USER}x{ASSISTANT}</think>")  # fmt: skip

    def test_the_greatest_effort_stands_before_all(self):
        messages = [say("user", "x")]
        effort = {**THINKING, "reasoning_effort": "max"}
        self.check(V4, messages, f"Think on and on.\n{USER}x{ASSISTANT}<think>", variables=effort)

    def test_tools_of_v4(self):
        first = f"Be brief.{TOOLS_TEXT}{USER}1+1?{ASSISTANT}"
        # With tools, thoughts of earlier turns stay.
        rest = f"{{}}2{EOS}{USER}2+2?{ASSISTANT}"
        self.check(V4, TURNS, f"{first}</think>{rest.format('')}</think>", tools=[ADD])
        self.check(V4, TURNS, f"{first}<think>{rest.format('easy</think>')}<think>", tools=[ADD], variables=THINKING)
        self.check(V4, [say("user", "x")], f"{TOOLS_TEXT}{USER}x{ASSISTANT}</think>", tools=[ADD])

    def test_calls_and_results_of_v4(self):
        messages = [
            say("user", "both?"),
            asked('{"a": 1, "b": "é\\n"}', "{}", content="So.", reasoning_content="hm"),
            result(1, "second"),
            result(0, "first"),
            say("user", "and now?"),
        ]
        dsml = (
            "\n\n<｜DSML｜tool_calls>\n"
            '<｜DSML｜invoke name="add">\n'
            '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="b" string="true">é\n</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n"
            '<｜DSML｜invoke name="add">\n\n</｜DSML｜invoke>\n'
            "</｜DSML｜tool_calls>"
        )
        results = "<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nand now?"
        for variables, mark, thought in (({}, "</think>", ""), (THINKING, "<think>", "hm</think>")):
            expected = f"{USER}both?{ASSISTANT}{mark}{thought}So.{dsml}{EOS}{USER}{results}{ASSISTANT}{mark}"
            self.check(V4, messages, TOOLS_TEXT + expected, tools=[ADD], variables=variables)

    def test_calls_and_results_of_v32(self):
        messages = [
            say("user", "old"),
            say("assistant", "yes", reasoning_content="gone"),
            say("user", "both?"),
            asked('{"a": [1]}', "{}", reasoning_content="hm"),
            result(1, "second"),
            result(0, "first"),
        ]
        dsml = (
            "\n\n<｜DSML｜function_calls>\n"
            '<｜DSML｜invoke name="add">\n'
            '<｜DSML｜parameter name="a" string="false">[1]</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n"
            '<｜DSML｜invoke name="add">\n\n</｜DSML｜invoke>\n'
            "</｜DSML｜function_calls>"
        )
        results = "\n\n<function_results>\n<result>first</result>\n<result>second</result>\n</function_results>\n\n"
        past = f"{TOOLS_TEXT}{USER}old{ASSISTANT}</think>yes{EOS}{USER}both?{ASSISTANT}"
        for variables, mark, thought in (({}, "</think>", ""), (THINKING, "<think>", "hm</think>")):
            expected = f"{past}{mark}{thought}{dsml}{EOS}{results}{mark}"
            self.check(V32, messages, expected, tools=[ADD], variables=variables)

    def test_results_that_name_no_call_stay_in_their_order(self):
        for name in (None, [], "call_9"):
            results = [{**result(1, "second"), "tool_call_id": name}, result(0, "first")]
            for template in (V4, V32):
                text = template.render([say("user", "x"), asked("{}", "{}"), *results])
                self.assertLess(text.index("second"), text.index("first"))

    def test_parsers_read_the_calls_that_the_prompt_shows(self):
        self.assertEqual((THINK_START, THINK_END, MARK), ("<think>", "</think>", "｜DSML｜"))
        arguments = '{"a": 1, "b": "x</b>\\n", "c": null, "d": ["é", {}]}'
        for template, parser in ((V4, DeepSeekV4Parser), (V32, DeepSeekV32Parser)):
            text = template.render(
                [say("user", "x"), asked(arguments, "{}", content="So."), result(0, "1"), result(1, "2")]
            )
            _, _, reply = text.partition("</think>")
            reply, _, _ = reply.partition(EOS)
            reader = parser({"add": {}})
            events = reader.feed(reply) + reader.finish()
            self.assertEqual(events[0], "So.")
            self.assertEqual([json.loads(event.arguments) for event in events[1:]], [json.loads(arguments), {}])

    def test_a_begun_reply_goes_on(self):
        begun = [say("user", "x"), say("assistant", "It is ")]
        for template in (V4, V32):
            options = {"continue_final_message": True}
            self.check(template, begun, f"{USER}x{ASSISTANT}</think>It is ", **options)
            self.check(template, begun, f"{USER}x{ASSISTANT}<think></think>It is ", variables=THINKING, **options)


class TestRefusals(CustomTestCase):
    def test_what_cannot_be_told_to_the_model(self):
        hello = [say("user", "x")]
        bare = (DeepSeekV4Template({}), DeepSeekV32Template({}))
        for templates, messages, options, named in (
            (bare, hello, {"tools": [ADD]}, "encoding/encoding_dsv"),
            (bare, hello, {"variables": {**THINKING, "reasoning_effort": "max"}}, "REASONING_EFFORT_MAX"),
            ((V4, V32), hello, {"variables": {"reasoning_effort": "max"}}, "needs chat_template_kwargs"),
            ((V4, V32), hello, {"variables": {"thinking": "yes"}}, "thinking must be true or false"),
            ((V4, V32), hello, {"variables": {"drop": True}}, "drop: this model knows"),
            ((V4, V32), hello, {"variables": {"messages": []}}, "may not set messages"),
            ((V4, V32), [*hello, say("function", "1", name="add")], {}, r"messages\[1\].role 'function'"),
            ((V4, V32), [*hello, say("assistant", "y")], {}, "role 'assistant'"),
            ((V4, V32), [*hello, say("system", "y")], {}, "role 'system'"),
            ((V4, V32), [*hello, asked('"x"'), result(0, "1")], {}, "must be a JSON object"),
            ((V4, V32), [say("assistant", "y", reasoning=[1]), *hello], {}, r"messages\[0\].reasoning_content"),
            ((V32,), [*hello, asked("{}", "{}"), result(0, "1")], {}, "2 calls have 1 results"),
            ((V32,), [*hello, result(0, "1")], {}, "0 calls have 1 results"),
        ):
            for template in templates:
                with self.assertRaisesRegex(ChatTemplateError, named):
                    template.render(messages, **options)

    def test_texts_of_a_file_that_reach_too_far(self):
        for field in ("{tool_schemas.__class__}", "{dsml_token:>999999999}", "{dsml_token!r}", "{other}", "{", "{0}"):
            with self.assertRaisesRegex(ChatTemplateError, "cannot be filled"):
                DeepSeekV4Template({"TOOLS_TEMPLATE": field})
        self.assertEqual(DeepSeekV4Template({"TOOLS_TEMPLATE": "{{}}{tool_schemas}"}).render(
            [say("user", "x")], tools=[ADD]), f"{BOS}\n\n{{}}{ADD_TEXT}{USER}x{ASSISTANT}</think>")  # fmt: skip


class TestFolders(CustomTestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        backend = byte_level_tokenizer()
        backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in TOKENS])
        self.backend = backend
        self.write("deepseek_v4")

    def write(self, model_type, template=None, backend=None):
        write_tokenizer(str(self.folder), backend or self.backend, chat_template=template)
        (self.folder / "config.json").write_text(json.dumps({"model_type": model_type}))

    def code(self, name, text):
        (self.folder / "encoding").mkdir(exist_ok=True)
        (self.folder / "encoding" / name).write_text(text, encoding="utf-8")

    def template(self):
        return Tokenizer.from_path(str(self.folder)).chat_template

    def test_whose_form_it_is(self):
        self.assertIsInstance(self.template(), DeepSeekV4Template)
        self.assertEqual(self.template().texts, {})
        self.code("encoding_dsv4.py", V4_CODE)
        self.assertIn(TOOLS_TEXT, self.template().render([say("user", "x")], tools=[ADD]))
        self.write("deepseek_v32")
        with self.assertLogs(deepseek_template.logger, "WARNING"):  # the file of another model
            self.assertIsNone(self.template())
        self.code("encoding_dsv32.py", V32_CODE)
        self.assertIsInstance(self.template(), DeepSeekV32Template)
        self.write("deepseek_v4", template="own:{{ messages[0].content }}")
        self.assertEqual(self.template().render([say("user", "x")]), "own:x")
        self.write("deepseek_v3")
        self.assertIsNone(self.template())

    def test_forms_that_are_not_known(self):
        for change, name in (
            (("<tool_result>", "<tool>"), "tool_output_template"),
            (("<｜begin", "<|begin"), "bos_token"),
            (("REASONING_EFFORT_MAX", "REASONING_EFFORT_LOW"), "REASONING_EFFORT_LOW"),
        ):
            self.code("encoding_dsv4.py", V4_CODE.replace(*change))
            with self.assertLogs(deepseek_template.logger, "WARNING") as logs:
                self.assertIsNone(self.template())
            self.assertIn(name, logs.output[0])
        with self.assertRaisesRegex(ChatTemplateError, "no chat template"):
            Tokenizer.from_path(str(self.folder)).apply_chat_template([say("user", "x")])
        for broken in ("(", "(" * 10000, "x = \0"):
            self.code("encoding_dsv4.py", broken)
            with self.assertRaisesRegex(ChatTemplateError, "cannot be read as Python"):
                self.template()

    def test_a_tokenizer_without_the_marks_has_no_chat(self):
        self.write("deepseek_v4", backend=byte_level_tokenizer())
        with self.assertLogs(deepseek_template.logger, "WARNING") as logs:
            self.assertIsNone(self.template())
        self.assertIn(BOS, logs.output[0])


class TestServed(ChatServerCase):
    template, added_tokens = None, TOKENS
    settings = {"tool_call_parser": "deepseekv4", "reasoning_parser": "deepseek-v4"}

    def test_a_thought_and_a_call_over_http(self):
        self.fake.context.manager.tokenizer.chat_template = V4
        calls = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
        self.say(f"hm</think>So.\n\n{calls}")
        body = {"model": "default", "messages": [say("user", "x")], "tools": [ADD], "temperature": 0}
        reply = self.client.chat.completions.create(**body, extra_body={"chat_template_kwargs": THINKING})
        message = reply.choices[0].message
        self.assertEqual((message.reasoning_content, message.content), ("hm", "So."))
        self.assertEqual([c.function.name for c in message.tool_calls], ["add"])
        prompt = self.fake.tokenizer.decode(self.fake.scheduler.received[-1].input_ids, skip_special_tokens=False)
        self.assertEqual(prompt, f"{BOS}{TOOLS_TEXT}{USER}x{ASSISTANT}<think>")
        for extra in ({"chat_template_kwargs": {"drop": 1}}, {"reasoning_effort": "max"}):
            with self.assertRaises(openai.BadRequestError):
                self.client.chat.completions.create(**body, extra_body=extra)


if __name__ == "__main__":
    unittest.main()
