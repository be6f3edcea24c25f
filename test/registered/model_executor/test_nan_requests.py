"""A token whose row of the embedding is not finite ends each request that has it, and changes no other, in every kind
of step; what it left in the prefix cache is served to nobody."""

from __future__ import annotations

import math
import tempfile
import unittest
from typing import Any

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness, Finished
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

use_fakes()
register_cpu_ci(est_time=120, suite="stage-b-test-cpu")

# The token whose row is spoiled, which no other request has.
BAD = 3
PROMPT = [5 + (7 * i) % 40 for i in range(600)]
DRAFTS = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 2, "dtype": "float32"}
CHUNKS = {"chunked_prefill_size": 16}


def with_bad(at: int, length: int) -> list[int]:
    return [*PROMPT[:at], BAD, *PROMPT[at + 1 : length]]


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True, logit_bias={str(BAD): -1e4}, **fields)


class TestNanRequests(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        for name in ("dsv3", "q35moe-ns"):
            save_tiny_checkpoint(name, f"{cls.folder.name}/{name}")

    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())

    def engine(self, model: str, **settings: Any) -> EngineHarness:
        backend = "compressed" if model == "deepseek-v4-tiny" else "triton"
        defaults = {
            "attention_backend": backend, "cuda_graph_bs": [1, 4], "random_seed": 1, "max_running_requests": 8,
            "piecewise_cuda_graph_tokens": [8, 24, 96], "max_total_tokens": 4096 if backend == "compressed" else 1024,
        }  # fmt: skip
        folder = EMBEDDED_MODELS[model] if model in EMBEDDED_MODELS else f"{self.folder.name}/{model}"
        return EngineHarness(str(folder), **{**defaults, **settings})

    def ended(self, result: Finished) -> None:
        reason = result.finish_reason
        assert reason is not None
        self.assertEqual((reason.type, reason.status_code), ("abort", 500))
        self.assertIn("not numbers", reason.message)

    def serve(self, engine: EngineHarness, **prompts: list[int]) -> dict[str, Finished]:
        engine.results.clear()
        for rid, prompt in prompts.items():
            engine.submit(rid, prompt, greedy())
        return engine.run()

    def check(self, model: str, value: float = math.nan, length: int = 60, **settings: Any) -> None:
        """Requests with the token at the first, a middle and the last of ``length`` places of their prompts."""
        engine = self.engine(model, **settings)
        row = engine.runner.model.model.embed_tokens.weight.data[BAD]
        sound = row.clone()
        others = {"long": PROMPT[:50] + [9] * 8, "short": [11, 12], "fork": PROMPT[:30] + [44, 45]}
        bad = {f"at-{place}": with_bad(place, length) for place in (0, length * 2 // 3, length - 1)}
        wanted = {rid: self.serve(engine, **{rid: prompt})[rid].output_ids for rid, prompt in others.items()}
        engine.memory.tree.reset()
        right = {rid: self.serve(engine, **{rid: prompt})[rid].output_ids for rid, prompt in bad.items()}
        engine.memory.tree.reset()
        for rid, prompt in bad.items():
            row.fill_(value)
            results = self.serve(engine, **{rid: prompt}, **others)
            self.ended(results[rid])
            # Sampled from a sound prompt, it ends its request when it is read.
            engine.submit("drawn", PROMPT[:20], SamplingParams(
                temperature=0.0, max_new_tokens=6, ignore_eos=True, logit_bias={str(BAD): 1e4}
            ))  # fmt: skip
            engine.submit("beside", others["fork"], greedy())
            results = {**results, **engine.run()}
            self.ended(results["drawn"])
            self.assertEqual(results["drawn"].output_ids, [BAD])
            self.assertEqual(results["beside"].output_ids, wanted["fork"])
            self.assertEqual({name: results[name].output_ids for name in others}, wanted)
            self.ended(self.serve(engine, again=prompt)["again"])
            # Its prefix was cached by nobody: with a sound row the same prompt is right.
            row.copy_(sound)
            found = self.serve(engine, **{rid: prompt})[rid]
            self.assertEqual(found.output_ids, right[rid])
            engine.memory.tree.reset()

    def test_captured_steps(self) -> None:
        for model in ("dsv3", "q35moe-ns", "deepseek-v4-tiny"):
            for value in (math.nan, math.inf):
                with self.subTest(model, value=value):
                    self.check(model, value)

    def test_kinds_of_steps(self) -> None:
        for model, settings in (
            ("dsv3", {**CHUNKS, "overlap": True}),
            ("dsv3", {**CHUNKS, "page_size": 4, "enable_mixed_chunk": True, "overlap": True}),
            ("dsv3", {"disable_cuda_graph": True}),
            ("q35moe-ns", {**CHUNKS, "overlap": True}),
            ("deepseek-v4-tiny", {"chunked_prefill_size": 256, "length": 600, "overlap": True}),
        ):
            with self.subTest(model, **settings):
                self.check(model, **settings)

    def test_drafts(self) -> None:
        for model in ("deepseek-v3-tiny", "qwen3.5-moe-tiny", "deepseek-v4-tiny"):
            with self.subTest(model):
                self.check(model, **DRAFTS, overlap=True)


if __name__ == "__main__":
    unittest.main()
