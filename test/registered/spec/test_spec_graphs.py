"""Captured steps of speculation under HIP's policy on a CPU: proven at start-up, replayed, with the same tokens."""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.registry import fresh_decisions
from sglang.srt.model_executor.runner_build import prove_graphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

use_fakes()
register_cpu_ci(est_time=25, suite="stage-b-test-cpu")

BUCKETS = [1, 2, 4]
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.02},
    {"temperature": 0.0, "frequency_penalty": 0.6},
)


class SpecGraphs(CustomTestCase):
    folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])

    @classmethod
    def setUpClass(cls) -> None:
        cls.tokenizer = Tokenizer.from_path(cls.folder)
        cls.prompts = [cls.tokenizer.encode(question.text) for question in heldout_questions()[:7]]

    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())

    def engine(self, num_steps: int = 3, **settings: Any) -> EngineHarness:
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps} if num_steps else {}
        options = {"max_total_tokens": 1024, "max_running_requests": 4, "cuda_graph_bs": BUCKETS, "random_seed": 1}
        return EngineHarness(
            self.folder, with_tokenizer=True, **{**options, "attention_backend": "triton", **spec, **settings}
        )

    def tokens(self, engine: EngineHarness, kinds: tuple[dict[str, Any], ...] = KINDS) -> dict[str, list[int]]:
        for number, prompt in enumerate(self.prompts):
            kind = kinds[number % len(kinds)]
            params = SamplingParams(
                **{"max_new_tokens": 5 + number, "ignore_eos": True, "sampling_seed": number, **kind}
            )
            engine.submit(f"r{number}", prompt, params)
        return {rid: result.output_ids for rid, result in engine.run().items()}


class TestVerify(SpecGraphs):
    STEPS: tuple[int, ...] = (1, 3)

    def test_replayed_steps_give_the_tokens_of_eager_ones(self) -> None:
        wanted = self.tokens(self.engine(0, disable_cuda_graph=True))
        for num_steps in self.STEPS:
            with self.subTest(num_steps=num_steps):
                engine = self.engine(num_steps)
                graphs = engine.runner.decode_graphs
                assert graphs is not None
                self.assertEqual((graphs.name, graphs.kind.rows_per_request), ("verify", num_steps + 1))
                self.assertEqual(graphs.describe(), {"captured": BUCKETS, "refused": {}})
                with mock.patch.object(graphs, "replay", wraps=graphs.replay) as replay:
                    self.assertEqual(self.tokens(engine), wanted)
                sizes = [(call.args[0].batch_size, call.args[1]) for call in replay.call_args_list]
                self.assertTrue({(4, 4), (3, 4)} <= set(sizes), sizes)
                metrics = engine.scheduler.metrics
                self.assertEqual(len(sizes), metrics.num_decode_steps)
                self.assertGreater(metrics.num_accepted_drafts, 0)
                self.assertLess(metrics.num_accepted_drafts, metrics.num_drafts)


class TestVerifyWithStates(TestVerify):
    """Of Qwen3.5, whose verify steps run on copies of recurrent states."""

    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])
    STEPS = (2,)


class TestProof(SpecGraphs):
    @torch.inference_mode()
    def test_a_replay_that_leaves_one_call_out_is_refused(self) -> None:
        engine = self.engine(2, cuda_graph_bs=[2])
        graphs = engine.runner.decode_graphs
        assert graphs is not None
        step = graphs._steps[2]
        calls = step.graph._calls
        acting = [index for index, call in enumerate(calls) if "empty" not in call.name]
        for index in [*acting[:9], *acting[9 :: len(acting) // 3]]:
            graphs.refused.clear()
            left_out = calls.pop(index)
            for result in left_out.results:  # which hold what the proof of the last turn left
                _ = None if result is None else result.zero_()
            prove_graphs(engine.runner, graphs)
            self.assertIn(2, graphs.refused, (index, left_out.name))
            graphs._steps[2] = step
            calls.insert(index, left_out)


if __name__ == "__main__":
    unittest.main()
