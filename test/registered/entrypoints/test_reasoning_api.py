"""Thought apart from answer in the chat endpoint: whole and streamed, counted, switched off, continued."""

import types
import unittest
from unittest import mock

import openai

from sglang.srt.configs.errors import ConfigError
from sglang.srt.entrypoints.openai import reply_reader
from sglang.test.chat_server import ChatServerCase
from sglang.test.chat_templates import STYLES
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "27+58?"}]
MARKS = ("<think>", "</think>")
THOUGHT, ANSWER = "7+8 is 15 <b>\n\nso 85", "It is **85** 😀"


class ReasoningTestCase(ChatServerCase):
    template, added_tokens, settings = STYLES["qwen3.5"], MARKS, {"reasoning_parser": "qwen3"}

    def both(self, messages=HI, **options):
        """Thought, answer and reasoning tokens, which are the same whole and streamed."""
        extra = options.pop("extra_body", {})
        options = {"model": "default", "messages": messages, "temperature": 0, **options}
        whole = self.client.chat.completions.create(**options, extra_body=extra)
        message = whole.choices[0].message
        found = getattr(message, "reasoning_content", None), message.content, whole.usage.reasoning_tokens
        stream = self.client.chat.completions.create(
            **options, extra_body=extra, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        self.deltas = [chunk.choices[0].delta for chunk in chunks]
        thoughts = [getattr(delta, "reasoning_content", None) for delta in self.deltas]
        answers = [delta.content for delta in self.deltas]
        streamed = "".join(filter(None, thoughts)) or None, "".join(filter(None, answers)), last.usage.reasoning_tokens
        self.assertEqual(streamed, (found[0], found[1] or "", found[2]))
        self.assertFalse(any(thought and answer for thought, answer in zip(thoughts, answers, strict=True)))
        return found


class TestQwen(ReasoningTestCase):
    def test_prompt_that_opens_the_thought(self):
        count = self.say(f"{THOUGHT}\n</think>")
        self.say(f"{THOUGHT}\n</think>\n\n{ANSWER}")
        self.assertEqual(self.both(), (THOUGHT, ANSWER, count))
        self.assertGreater(sum(bool(getattr(delta, "reasoning_content", None)) for delta in self.deltas), 3)

    def test_prompt_that_closes_it(self):
        self.say(f"{ANSWER}</think>")
        for extra in ({"chat_template_kwargs": {"enable_thinking": False}},):
            self.assertEqual(self.both(extra_body=extra), (None, f"{ANSWER}</think>", 0))

    def test_a_reply_that_ends_in_its_thought(self):
        count = self.say("still thinking ")
        self.assertEqual(self.both(), ("still thinking", None, count + 1))
        self.say(f"{THOUGHT}\n</think>\n\n{ANSWER}")
        thought, answer, count = self.both(max_tokens=3)
        self.assertTrue(THOUGHT.startswith(thought))
        self.assertEqual((answer, count), (None, 3))

    def test_switches(self):
        self.say(f"{THOUGHT}\n</think>\n\n{ANSWER}")
        found = self.both(extra_body={"separate_reasoning": False})
        self.assertEqual(found, (None, f"{THOUGHT}\n</think>\n\n{ANSWER}", 0))
        self.assertEqual(self.both(extra_body={"stream_reasoning": False})[:2], (THOUGHT, ANSWER))
        thoughts = [delta.reasoning_content for delta in self.deltas if getattr(delta, "reasoning_content", None)]
        self.assertEqual(thoughts, [THOUGHT])
        self.assertEqual(getattr(self.deltas[1], "reasoning_content", None), THOUGHT)  # before the answer
        ids = self.fake.tokenizer.encode("x<think>\n", add_special_tokens=False)
        self.assertEqual(self.both(extra_body={"input_ids": ids})[:2], (THOUGHT, ANSWER))

    def test_every_choice_has_a_parser_of_its_own(self):
        self.say(f"{THOUGHT}\n</think>\n\n{ANSWER}")
        count = self.both()[2]
        reply = self.client.chat.completions.create(model="default", messages=HI, n=3, logprobs=True)
        for choice in reply.choices:
            self.assertEqual((choice.message.reasoning_content, choice.message.content), (THOUGHT, ANSWER))
            self.assertGreater(len(choice.logprobs.content), count)
        self.assertEqual(reply.usage.reasoning_tokens, 3 * count)
        texts, num_logprobs = {}, 0
        stream = self.client.chat.completions.create(model="default", messages=HI, n=3, logprobs=True, stream=True)
        for chunk in stream:
            choice = chunk.choices[0]
            text = getattr(choice.delta, "reasoning_content", None) or choice.delta.content or ""
            texts[choice.index] = texts.get(choice.index, "") + text
            num_logprobs += len(choice.logprobs.content) if choice.logprobs else 0
        self.assertEqual(texts, dict.fromkeys(range(3), THOUGHT + ANSWER))
        self.assertEqual(num_logprobs, sum(len(choice.logprobs.content) for choice in reply.choices))

    def test_a_continued_message(self):
        self.say(f"more\n</think>\n\n{ANSWER}")
        for begun, found in (
            ("<think>\nI begin ", ("more", ANSWER)),
            ("The answer ", (None, f"more\n</think>\n\n{ANSWER}")),
        ):
            with mock.patch.object(self.fake.tokenizer, "apply_chat_template", return_value=f"<think>\n{begun}"):
                messages = [*HI, {"role": "assistant", "content": begun}]
                self.assertEqual(self.both(messages, extra_body={"continue_final_message": True})[:2], found)

    def test_the_thought_comes_back_in_the_history(self):
        self.say("x")
        self.both([*HI, {"role": "assistant", "content": "85", "reasoning_content": "hm"}, *HI])
        self.assertIn("85", self.prompt())

    def test_other_endpoints_refuse_it(self):
        for path, body in (("/completions", {"prompt": "a"}), ("/../generate", {"text": "a"})):
            with self.assertRaises(openai.BadRequestError) as caught:
                self.client.post(path, body={**body, "separate_reasoning": True}, cast_to=object)
            self.assertIn("/v1/chat/completions", str(caught.exception))


class TestDeepSeek(ReasoningTestCase):
    template, settings = STYLES["deepseek-v3.1"], {"reasoning_parser": "deepseek-v31"}

    def test_the_prompt_decides(self):
        count = self.say(f"{THOUGHT}</think>")
        self.say(f"{THOUGHT}</think>{ANSWER}")
        extra = {"chat_template_kwargs": {"thinking": True}}
        self.assertEqual(self.both(extra_body=extra), (THOUGHT, ANSWER, count))
        self.assertEqual(self.both(), (None, f"{THOUGHT}</think>{ANSWER}", 0))


class TestR1(ReasoningTestCase):
    template, added_tokens, settings = STYLES["deepseek-v3"], (), {"reasoning_parser": "deepseek-r1"}

    def test_thinks_where_the_prompt_does_not_tell_and_marks_are_no_tokens(self):
        self.say(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
        thought, answer, count = self.both()
        self.assertEqual((thought, answer), (THOUGHT, ANSWER))
        self.assertGreater(count, 5)
        self.say(THOUGHT)
        self.assertEqual(self.both()[:2], (THOUGHT, None))


class TestLaunch(CustomTestCase):
    def test_hidden_marks_are_refused_and_other_templates_warned_of(self):
        hides = types.SimpleNamespace(token_id=lambda _: 5, decode=lambda _: "", chat_template=None)
        args, manager = (
            types.SimpleNamespace(reasoning_parser="qwen3", tool_call_parser=None),
            types.SimpleNamespace(tokenizer=hides),
        )
        with self.assertRaises(ConfigError) as caught:
            reply_reader.ReplyParsers(types.SimpleNamespace(server_args=args, manager=manager))
        self.assertIn("special token", str(caught.exception))
        with self.assertLogs(reply_reader.logger, "WARNING") as logs:
            fake = FakeServer(reasoning_parser="qwen3").wait_ready()
        self.addCleanup(fake.stop)
        self.assertIn("chat template does not contain", logs.output[0])

    def test_without_the_flag_the_field_has_no_effect_and_that_is_said(self):
        fake = FakeServer().wait_ready()
        self.addCleanup(fake.stop)
        client = openai.OpenAI(base_url=f"{fake.url}/v1", api_key="k", max_retries=0)
        self.addCleanup(client.close)
        ids = fake.tokenizer.encode("<think>hm</think>85", add_special_tokens=False)
        fake.scheduler.script = lambda _: [*ids, 1]
        for value, warned in ((True, ["separate_reasoning has no effect"]), (False, []), (None, [])):
            extra = {"separate_reasoning": value, "return_warnings": True}
            reply = client.chat.completions.create(model="default", messages=HI, extra_body=extra)
            self.assertEqual(reply.choices[0].message.content, "<think>hm</think>85")
            self.assertEqual([text.partition(":")[0] for text in reply.warnings], warned)


if __name__ == "__main__":
    unittest.main()
