"""A served model that is a script, for the libraries of agents: it calls the tool that it is shown, then answers."""

from __future__ import annotations

import json

import pydantic

from sglang.test.chat_server import ChatServerCase

ANSWER = '{"city": "Paris", "people": 2}'
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
ASKED = "Where, and how many?"


class Place(pydantic.BaseModel):
    """Where, and how many."""

    city: str
    people: int


class ScriptedAgentCase(ChatServerCase):
    """The model is a script: it calls the first tool that it is shown, then answers; with a form it says ANSWER."""

    context_len = 8192
    base: str

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.fake.scheduler.script = cls.act
        cls.base = f"{cls.fake.url}/v1"

    @classmethod
    def act(cls, message):
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
