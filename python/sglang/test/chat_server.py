"""One fake server per class of tests whose model says what a test tells it, behind OpenAI's client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai

from sglang.test.chat_templates import STYLES
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase


class ChatServerCase(CustomTestCase):
    """Qwen3's template and parsers where a class names no others; ``settings`` are fields of ServerArgs."""

    template: str | None = STYLES["qwen3"]
    added_tokens: Sequence[str] = ("<think>", "</think>", "<tool_call>")
    settings: dict[str, Any] = {"tool_call_parser": "qwen25", "reasoning_parser": "qwen3"}
    context_len = 2048
    fake: FakeServer
    client: openai.OpenAI

    @classmethod
    def setUpClass(cls) -> None:
        config = {"chat_template": cls.template}
        cls.fake = FakeServer(
            added_tokens=cls.added_tokens, tokenizer_config=config, context_len=cls.context_len, **cls.settings
        ).wait_ready()
        cls.addClassCleanup(cls.fake.stop)
        cls.client = openai.OpenAI(base_url=f"{cls.fake.url}/v1", api_key="k", max_retries=0, timeout=120)
        cls.addClassCleanup(cls.client.close)

    def say(self, text: str) -> int:
        """Let the model say ``text`` to every request of this test from now on; returns how many tokens that is."""
        assert self.fake.tokenizer is not None
        ids = self.fake.tokenizer.encode(text, add_special_tokens=False)
        scheduler = self.fake.scheduler
        self.addCleanup(setattr, scheduler, "script", scheduler.script)
        scheduler.script = lambda _: [*ids, 1]
        return len(ids)

    def prompt(self) -> str:
        """The text of the prompt that the model got last."""
        assert self.fake.tokenizer is not None
        return self.fake.tokenizer.decode(self.fake.scheduler.received[-1].input_ids)
