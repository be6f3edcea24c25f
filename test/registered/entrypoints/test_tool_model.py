"""The embedded model with tools, served: an agent's loop thinks, calls the tool, reads its result, and replies."""

import json
import random
import unittest
import zlib
from concurrent.futures import ThreadPoolExecutor

import openai

from sglang.embedded_models import EMBEDDED_MODELS, TOOLS_MODEL
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server
from sglang.test.tool_tasks import ANSWER, CALL, CHAT, NO_TOOL, answer, calculator_tool, tool_task

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

NUM_TASKS = 8
FLAGS = ("--tool-call-parser", "deepseekv3", "--reasoning-parser", "deepseek-v31", "--max-running-requests", "8")
SUM = [{"role": "user", "content": "What is 4821*377?"}]


def tasks(kind):
    rng = random.Random(f"served/{kind}")
    return [tool_task(rng, heldout=True, kind=kind) for _ in range(NUM_TASKS)]


class TestToolModel(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        url = free_url()
        server = popen_launch_server(str(EMBEDDED_MODELS[TOOLS_MODEL]), url, other_args=FLAGS)
        cls.addClassCleanup(lambda: (kill_process_tree(server.pid), server.wait()))
        cls.client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=120)
        cls.addClassCleanup(cls.client.close)

    def say(self, messages, tools=(), thinks=True, **options):
        """The message that follows, of greedy tokens."""
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinks}}
        offered = {"tools": list(tools)} if tools else {}
        reply = self.client.chat.completions.create(
            model="default", messages=messages, temperature=0, max_tokens=400, extra_body=kwargs, **offered, **options
        )
        return reply.choices[0]

    def streamed(self, messages, tools):
        """Thought, content and calls, put together of the deltas of the same request."""
        thought, content, calls = "", "", []
        for chunk in self.client.chat.completions.create(
            model="default", messages=messages, tools=list(tools), temperature=0, max_tokens=400, stream=True
        ):
            delta = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
            calls += [(call.function.name, call.function.arguments) for call in delta.tool_calls or []]
        return thought, content, calls

    def num_right(self, kind, is_right):
        with ThreadPoolExecutor(NUM_TASKS) as pool:
            return sum(pool.map(is_right, tasks(kind)))

    def test_calls(self):
        def is_right(task):
            found = self.say(task.messages, task.tools)
            calls = [(call.function.name, call.function.arguments) for call in found.message.tool_calls or []]
            whole = found.message.reasoning_content, found.message.content or "", calls
            self.assertEqual(self.streamed(task.messages, task.tools), whole)
            return (whole, found.finish_reason) == ((task.thought, "", task.calls), "tool_calls")

        self.assertEqual(self.num_right(CALL, is_right), NUM_TASKS)

    def test_what_is_no_call(self):
        for kind in (ANSWER, CHAT, NO_TOOL):

            def is_right(task):
                found = self.say(task.messages, task.tools)
                said = found.message.reasoning_content, found.message.content, found.message.tool_calls
                return said == (task.thought, task.content, None)

            with self.subTest(kind):
                self.assertEqual(self.num_right(kind, is_right), NUM_TASKS)

    def test_an_agent_with_a_calculator(self):
        """Numbers too long for the model: it is right only by the tool's result."""

        def is_right(task):
            messages, terms, results = list(task.messages), [], []
            for _ in range(3):
                message = self.say(messages, task.tools).message
                messages.append(message.model_dump(exclude_none=True))
                for call in message.tool_calls or []:
                    (term,) = json.loads(call.function.arguments).values()
                    terms.append(term)
                    # No real result, so that none can be known without the tool.
                    results.append(str(zlib.crc32(term.encode()) % 10**8))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": results[-1]})
                if not message.tool_calls:
                    return bool(terms) and message.content == answer(terms, results)
            return False

        self.assertEqual(self.num_right(CALL, is_right), NUM_TASKS)

    def test_switches(self):
        tool = calculator_tool()
        quiet = self.say(SUM, [tool], thinks=False).message
        self.assertIsNone(getattr(quiet, "reasoning_content", None))
        self.assertEqual(json.loads(quiet.tool_calls[0].function.arguments), {"expression": "4821*377"})
        self.assertIsNone(self.say(SUM, [tool], tool_choice="none").message.tool_calls)
        # A call is forced where the model would have talked.
        hello = [{"role": "user", "content": "hello there"}]
        self.assertIsNone(self.say(hello, [tool]).message.tool_calls)
        for choice in ("required", {"type": "function", "function": {"name": "calculator"}}):
            (call, *_) = self.say(hello, [tool], tool_choice=choice).message.tool_calls
            self.assertEqual(
                (call.function.name, list(json.loads(call.function.arguments))), ("calculator", ["expression"])
            )
        response = self.client.responses.create(
            model="default", input="What is 4821*377?", temperature=0,
            tools=[{"type": "function", "strict": False, **tool["function"]}],
        )  # fmt: skip
        self.assertEqual([item.type for item in response.output], ["reasoning", "function_call"])
        self.assertEqual(json.loads(response.output[1].arguments), {"expression": "4821*377"})


if __name__ == "__main__":
    unittest.main()
