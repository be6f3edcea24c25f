"""OpenAI's client for Python as agents use it: parsed output, parsed calls, responses whole and streamed."""

import unittest

import openai

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_agent import ASKED, Place, ScriptedAgentCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestOpenAI(ScriptedAgentCase):
    def test_openai(self):
        client, asked = self.client, [{"role": "user", "content": ASKED}]
        parsed = client.chat.completions.parse(model="default", messages=asked, response_format=Place)
        self.assertEqual(parsed.choices[0].message.parsed, Place(city="Paris", people=2))
        tool = openai.pydantic_function_tool(Place)
        called = client.chat.completions.parse(model="default", messages=asked, tools=[tool])
        (call,) = called.choices[0].message.tool_calls
        self.assertEqual(call.function.parsed_arguments, Place(city="Paris", people=2))
        reply = client.responses.parse(model="default", input=ASKED, text_format=Place)
        self.assertEqual(reply.output_parsed, Place(city="Paris", people=2))
        with client.responses.stream(model="default", input=ASKED) as stream:
            self.assertEqual("".join(e.delta for e in stream if e.type.endswith("text.delta")), "It is Paris, for 2.")
            self.assertEqual(stream.get_final_response().status, "completed")


if __name__ == "__main__":
    unittest.main()
