"""Agents' libraries against the server, each at its main job: structured output and tools (extra ``clients``)."""

import importlib.util
import json
import os
import unittest
from unittest import mock

import openai

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scripted_agent import ANSWER, ASKED, Place, ScriptedAgentCase

register_cpu_ci(est_time=30, suite="nightly-cpu", nightly=True)


def has(module):
    """Skips a test where its library is not installed: the summary counts it, and a skip is not a pass."""
    return unittest.skipUnless(importlib.util.find_spec(module), f"{module} is not installed: pip install .[clients]")


class TestClients(ScriptedAgentCase):
    @has("langchain_openai")
    def test_langchain(self):
        from langchain_openai import ChatOpenAI

        model = ChatOpenAI(model="default", base_url=self.base, api_key="k", max_retries=0)
        for method in ("json_schema", "function_calling", "json_mode"):
            with self.subTest(method):
                structured = model.with_structured_output(Place, method=method)
                self.assertEqual(structured.invoke(f"{ASKED} Say it in JSON."), Place(city="Paris", people=2))
        reply = model.bind_tools([Place]).invoke(ASKED)
        self.assertEqual((reply.tool_calls[0]["name"], reply.tool_calls[0]["args"]["people"]), ("Place", 2))
        self.assertEqual("".join(chunk.content for chunk in model.stream(ASKED)), "It is Paris, for 2.")

    @has("pydantic_ai")
    def test_pydantic_ai(self):
        from pydantic_ai import Agent, NativeOutput, ToolOutput
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        model = OpenAIChatModel("default", provider=OpenAIProvider(base_url=self.base, api_key="k"))
        for output in (ToolOutput(Place), NativeOutput(Place)):
            self.assertEqual(Agent(model, output_type=output).run_sync(ASKED).output, Place(city="Paris", people=2))
        agent, seen = Agent(model), []

        @agent.tool_plain
        def look(city: str) -> str:
            """Look at a city."""
            seen.append(city)
            return "2 people"

        self.assertEqual(agent.run_sync(ASKED).output, "It is Paris, for 2.")
        self.assertEqual(seen, ["Paris"])

    @has("instructor")
    def test_instructor(self):
        import instructor

        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
            with self.subTest(mode):
                client = instructor.from_openai(self.client, mode=mode)
                place = client.chat.completions.create(
                    model="default", messages=[{"role": "user", "content": ASKED}], response_model=Place, max_retries=0
                )
                self.assertEqual(place.model_dump(), {"city": "Paris", "people": 2})

    @has("litellm")
    @mock.patch.dict(os.environ, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})  # it would fetch a table of prices
    def test_litellm(self):
        import litellm

        where = {"api_base": self.base, "api_key": "k", "messages": [{"role": "user", "content": ASKED}]}
        for model in ("openai/default", "hosted_vllm/default"):
            reply = litellm.completion(model=model, **where)
            self.assertEqual(reply.choices[0].message.content, "It is Paris, for 2.")
        pieces = litellm.completion(model="openai/default", stream=True, **where)
        self.assertEqual("".join(piece.choices[0].delta.content or "" for piece in pieces), "It is Paris, for 2.")
        reply = litellm.completion(model="openai/default", response_format=Place, **where)
        self.assertEqual(json.loads(reply.choices[0].message.content), json.loads(ANSWER))

    @has("agents")
    def test_openai_agents(self):
        import agents

        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=self.base, api_key="k", max_retries=0, timeout=30)
        agents.set_default_openai_client(client, use_for_tracing=False)
        seen = []

        @agents.function_tool
        def look(city: str) -> str:
            """Look at a city."""
            seen.append(city)
            return "2 people"

        agent = agents.Agent(name="a", instructions="Answer.", tools=[look], model="default")
        self.assertEqual(agents.Runner.run_sync(agent, ASKED).final_output, "It is Paris, for 2.")
        self.assertEqual(seen, ["Paris"])
        agent = agents.Agent(name="b", instructions="Answer.", output_type=Place, model="default")
        self.assertEqual(agents.Runner.run_sync(agent, ASKED).final_output, Place(city="Paris", people=2))


if __name__ == "__main__":
    unittest.main()
