"""The embedded model with tools: the saved template writes the prompts it learns, and parsers read its replies."""

import json
import random
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.embedded_models import EMBEDDED_MODELS, TOOLS_MODEL
from sglang.srt.parser.reasoning_parser import ReasoningParser, opens_thought
from sglang.srt.parser.tool_calls.deepseekv3 import DeepSeekV3Parser
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import is_heldout
from sglang.test.tool_tasks import ANSWER, CALL, CHAT, KINDS, tool_task

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import train_tool_model  # noqa: E402
from train_tiny_models import IGNORE  # noqa: E402

register_cpu_ci(est_time=8, suite="stage-b-test-cpu")


def tasks(count=60, heldout=False):
    rng = random.Random(5)
    return [tool_task(rng, heldout, KINDS[number % len(KINDS)]) for number in range(count)]


class TestDocuments(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as folder:
            files = train_tool_model
            files.write_tokenizer_files(Path(folder), files.MORE_TOKENS, files.TEMPLATE, files.VISIBLE)
            cls.tokenizer = Tokenizer.from_path(folder)
        cls.writer = train_tool_model.Writer()

    def test_prompts_are_those_that_the_server_makes(self):
        for task in tasks():
            for thinks in (True, False):
                options = {"tools": task.tools or None, "variables": {"enable_thinking": thinks}}
                served = self.tokenizer.apply_chat_template(task.messages, **options)
                self.assertEqual(served, self.writer.prompt(task, thinks))
                self.assertIs(opens_thought(served), thinks)
                tokens, labels = self.writer.document(task, thinks)
                prompt = self.tokenizer.encode(served, add_special_tokens=False)
                reply = tokens[len(prompt) :]
                self.assertEqual(tokens[: len(prompt)], prompt)
                # Each token of the reply is learned at the one before it, and nothing else is.
                self.assertEqual([label for label in labels if label != IGNORE], reply)
                self.assertEqual(labels[len(prompt) - 1 : -1], reply)
                self.assertEqual(reply[-1], self.tokenizer.eos_token_id)

    def test_replies_are_read_by_the_parsers(self):
        for task in tasks():
            for thinks in (True, False):
                tokens, labels = self.writer.document(task, thinks)
                reply = self.tokenizer.decode([label for label in labels if label != IGNORE][:-1])
                reasoning = ReasoningParser(thinks)
                pieces = [reasoning.feed(reply), reasoning.finish()]
                thought, said = ("".join(part) for part in zip(*pieces, strict=True))
                self.assertEqual(thought, task.thought if thinks else "")
                calls = DeepSeekV3Parser({tool["function"]["name"]: {} for tool in task.tools})
                events = calls.feed(said) + calls.finish()
                self.assertEqual([(c.name, c.arguments) for c in events if not isinstance(c, str)], task.calls)
                self.assertEqual("".join(text for text in events if isinstance(text, str)), task.content)
                self.assertTrue(bool(task.calls) == (task.kind == CALL))

    def test_the_model_that_ships_has_the_files_that_the_script_writes(self):
        with tempfile.TemporaryDirectory() as folder:
            files = train_tool_model
            files.write_tokenizer_files(Path(folder), files.MORE_TOKENS, files.TEMPLATE, files.VISIBLE)
            for path in Path(folder).iterdir():
                self.assertEqual(path.read_bytes(), (EMBEDDED_MODELS[TOOLS_MODEL] / path.name).read_bytes())

    def test_a_call_in_the_past_is_written_as_the_model_says_it(self):
        (task,) = [task for task in tasks(2) if task.kind == CALL]
        calls = [
            {"id": str(number), "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(task.calls)
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls]
        history = [*task.messages, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
        text = self.tokenizer.apply_chat_template(history, tools=task.tools)
        self.assertIn("<|assistant|>" + train_tool_model.spoken(task) + "<|eos|>", text)

    def test_questions_that_are_held_out_are_not_learned(self):
        for heldout in (False, True):
            for task in tasks(heldout=heldout):
                if task.kind == CALL:
                    self.assertEqual(is_heldout(next(iter(json.loads(task.calls[0][1]).values()))), heldout)
                elif task.kind == ANSWER:
                    self.assertEqual(is_heldout(task.content.split(" = ")[0]), heldout)
                elif task.kind == CHAT:
                    self.assertEqual(is_heldout(task.messages[-1]["content"]), heldout)


if __name__ == "__main__":
    unittest.main()
