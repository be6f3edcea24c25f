"""Served checkpoints whose files disagree: the end tokens of every file are used."""

from __future__ import annotations

import json
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import httpx

from sglang import Engine
from sglang.embedded_models import default_model_path
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=45, suite="stage-b-test-cpu")

EOS, PAD = 257, 258
QUESTION = "<|bos|><|user|>27+58=<|assistant|>"
GREEDY = {"temperature": 0.0, "max_new_tokens": 24}


class CheckpointCase(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.holder = cls.enterClassContext(tempfile.TemporaryDirectory())

    @classmethod
    def copy(cls, name: str, generation: dict[str, Any] | None = None, **config: Any) -> str:
        """The embedded checkpoint with another generation_config.json (None: none) and keys of config.json."""
        folder = Path(cls.holder) / name
        shutil.copytree(default_model_path(), folder)
        (folder / "generation_config.json").unlink()
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, **config}))
        return str(folder)


class TestServedOverHttp(CheckpointCase):
    """generation_config.json names another end token than config.json and the tokenizer."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = cls.copy("generation", {"eos_token_id": PAD, "top_k": 0, "do_sample": False})
        cls.url = free_url()
        cls.process = popen_launch_server(folder, cls.url)
        cls.addClassCleanup(cls.process.wait)
        cls.addClassCleanup(kill_process_tree, cls.process.pid)
        cls.client = httpx.Client(base_url=cls.url, timeout=60, trust_env=False)
        cls.addClassCleanup(cls.client.close)

    def chat(self, **fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "27+58="}], "max_tokens": 24, **fields}
        answer = self.client.post("/v1/chat/completions", json=body)
        self.assertEqual(answer.status_code, 200, answer.text)
        return answer.json()["choices"][0]

    def test_the_turn_ends_and_defaults_are_greedy(self) -> None:
        choice = self.chat()
        self.assertEqual(choice["message"]["content"], "85")
        self.assertEqual((choice["finish_reason"], choice["matched_stop"]), ("stop", EOS))
        self.assertEqual(self.chat(top_k=0)["message"]["content"], "85")

    def test_min_tokens_and_ignore_eos_cover_the_union(self) -> None:
        body = {"text": QUESTION, "sampling_params": {**GREEDY, "min_new_tokens": 12}}
        reply = self.client.post("/generate", json=body).json()
        self.assertGreaterEqual(len(reply["output_ids"]), 12)
        self.assertFalse({EOS, PAD} & set(reply["output_ids"][:11]))
        forced = {**GREEDY, "logit_bias": {str(PAD): 1e6}, "max_new_tokens": 4}
        reply = self.client.post("/generate", json={"text": QUESTION, "sampling_params": forced}).json()
        self.assertEqual(reply["meta_info"]["finish_reason"], {"type": "stop", "matched": PAD})
        forced["ignore_eos"] = True
        reply = self.client.post("/generate", json={"text": QUESTION, "sampling_params": forced}).json()
        self.assertEqual(reply["output_ids"], [PAD] * 4)


class TestInPython(CheckpointCase):
    def test_engine_hears_the_tokenizer_alone(self) -> None:
        with Engine(model_path=self.copy("tokenizer", eos_token_id=PAD)) as engine:
            result = engine.generate(QUESTION, GREEDY)
        self.assertEqual(result["text"], "85")
        self.assertEqual(result["meta_info"]["finish_reason"], {"type": "stop", "matched": EOS})

    def test_without_a_tokenizer_the_other_files_count(self) -> None:
        harness = EngineHarness(self.copy("bare", {"eos_token_id": PAD}, eos_token_id=[EOS]))
        ids = [256, 260, *b"27+58=", 261]
        self.assertEqual(set(harness.scheduler.config.eos_token_ids), {EOS, PAD})
        harness.submit("a", ids, SamplingParams(temperature=0.0, max_new_tokens=24, logit_bias={str(EOS): 1e6}))
        harness.run()
        self.assertEqual(harness.results["a"].output_ids, [EOS])


if __name__ == "__main__":
    unittest.main()
