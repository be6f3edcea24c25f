"""A served model that is a script, for the libraries of agents: it calls the tool that it is shown, then answers."""

from __future__ import annotations

import json

import openai
import pydantic

from sglang.test.chat_templates import STYLES
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

ANSWER = '{"city": "Paris", "people": 2}'
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
ASKED = "Where, and how many?"


class Place(pydantic.BaseModel):
    """Where, and how many."""

    city: str
    people: int


class ScriptedAgentCase(CustomTestCase):
    """The model is a script: it calls the first tool that it is shown, then answers; with a form it says ANSWER."""

    fake: FakeServer
    base: str

    @classmethod
    def setUpClass(cls):
        cls.fake = FakeServer(
            added_tokens=("<think>", "</think>", "<tool_call>"),
            tokenizer_config={"chat_template": STYLES["qwen3"]},
            context_len=8192,
            tool_call_parser="qwen25",
            reasoning_parser="qwen3",
        ).wait_ready()
        cls.addClassCleanup(cls.fake.stop)
        cls.fake.scheduler.script = cls.say
        cls.base = f"{cls.fake.url}/v1"

    @classmethod
    def say(cls, message):
        tokenizer = cls.fake.tokenizer
        assert tokenizer is not None
        prompt = tokenizer.decode(list(message.input_ids), skip_special_tokens=False)
        lines = [line for line in prompt.splitlines() if line.startswith('{"type": "function"')]
        tools = [json.JSONDecoder().raw_decode(line)[0]["function"] for line in lines]
        text = "It is Paris, for 2."
        if tools and "<tool_response>" not in prompt:
            fields = tools[0]["parameters"].get("properties", {})
            arguments = {"city": "Paris", "people": 2} if "people" in fields else {name: "Paris" for name in fields}
            text = CALL.format(name=tools[0]["name"], arguments=json.dumps(arguments))
        elif message.grammar is not None or "JSON" in prompt:
            text = ANSWER
        return [*tokenizer.encode(text, add_special_tokens=False), 1]

    def client(self, kind=openai.OpenAI):
        client = kind(base_url=self.base, api_key="k", max_retries=0, timeout=30)
        if kind is openai.OpenAI:
            self.addCleanup(client.close)
        return client
