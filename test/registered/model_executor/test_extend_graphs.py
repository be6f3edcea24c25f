"""Captured extend steps over recorded graphs: the tokens of eager steps, the check, and which steps run eagerly."""

from __future__ import annotations

import contextlib
import tempfile
import unittest
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.layers.attention.triton_backend import TritonMlaBackend
from sglang.srt.model_executor.extend_graphs import MAX_CONTEXT, MIN_REQUESTS, ExtendGraphs, extend_buckets
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, LogprobRequest, ModelWorkerBatch
from sglang.srt.model_executor.memory_plan import extend_graph_buckets
from sglang.srt.model_executor.runner_build import prove_extend_graphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.spec_graph_cases import no_call_left_out
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

use_fakes()
register_cpu_ci(est_time=60, suite="stage-b-test-cpu")

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, max_new_tokens=4, ignore_eos=True, sampling_seed=3)


class TestOverFakes(CustomTestCase):
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
        settings = {"attention_backend": backend, "cuda_graph_bs": [2], "random_seed": 1, **settings}
        settings.setdefault("piecewise_cuda_graph_tokens", [1, 8, 24, 96])
        folder = EMBEDDED_MODELS[model] if model in EMBEDDED_MODELS else f"{self.folder.name}/{model}"
        return EngineHarness(str(folder), **{"max_total_tokens": 1024, "max_running_requests": 16, **settings})

    def graphs(self, engine: EngineHarness) -> ExtendGraphs:
        assert engine.runner.extend_graphs is not None
        return engine.runner.extend_graphs

    def tokens(self, engine: EngineHarness) -> dict[str, list[int]]:
        """One request, several at once, the same again after their prefixes, and more than a graph takes."""
        for group, size in enumerate((1, 3, 3, 5, MIN_REQUESTS + 1)):
            for number in range(size):
                prompt = list(range(5, 6 + (7 * number + 3 * group) % 40))
                engine.submit(f"{group}.{number}", prompt, DRAWN if number == 1 else GREEDY)
            engine.run()
        return {rid: result.output_ids for rid, result in engine.results.items()}

    def test_replays_give_the_tokens_of_eager_steps(self) -> None:
        for model, settings in (
            ("dsv3", {}),
            ("dsv3", {"page_size": 16}),
            ("dsv3", {"chunked_prefill_size": 16, "disable_radix_cache": True}),
            ("dsv3", {"enable_mixed_chunk": True, "chunked_prefill_size": 16, "overlap": True}),
            ("q35moe-ns", {}),
            ("q35moe-ns", {"chunked_prefill_size": 16}),
            ("deepseek-v4-tiny", {"dtype": "float32", "max_total_tokens": 4096}),
        ):
            with self.subTest(model, **settings):
                wanted = self.tokens(self.engine(model, disable_cuda_graph=True, **settings))
                engine = self.engine(model, **settings)
                graphs = self.graphs(engine)
                self.assertEqual(graphs.refused, {})
                with mock.patch.object(graphs, "run", wraps=graphs.run) as run:
                    self.assertEqual(self.tokens(engine), wanted)
                self.assertGreater(run.call_count, 1)

    def test_a_log_that_takes_nothing(self) -> None:
        """Progress bars are for terminals: written to a full disk they would end the launch."""
        full = mock.Mock(write=mock.Mock(side_effect=OSError("No space left on device")), isatty=lambda: False)
        with contextlib.redirect_stderr(full):
            self.assertEqual(self.graphs(self.engine("dsv3", piecewise_cuda_graph_tokens=[8])).captured, [8])

    def test_drafts_follow_replayed_prompts(self) -> None:
        settings = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 2, "dtype": "float32"}
        for model in ("deepseek-v3-tiny", "qwen3.5-moe-tiny", "deepseek-v4-tiny"):
            settings["max_total_tokens"] = 4096 if model == "deepseek-v4-tiny" else 1024
            with self.subTest(model):
                wanted = self.tokens(self.engine(model, disable_cuda_graph=True, **settings))
                engine = self.engine(model, **settings)
                self.assertEqual(self.graphs(engine).refused, {})
                self.assertEqual(self.tokens(engine), wanted)

    @torch.inference_mode()
    def test_a_replay_that_leaves_one_call_out_is_refused(self) -> None:
        for model in ("dsv3", "q35moe-ns"):
            engine = self.engine(model, piecewise_cuda_graph_tokens=[40])
            graphs = self.graphs(engine)
            idle = ("aten.zeros_like.default",)  # zeros already
            with self.subTest(model):
                no_call_left_out(self, graphs, partial(prove_extend_graphs, engine.runner, graphs), 17, idle, 40)

    def test_a_step_that_reads_the_host_is_refused_and_runs_eagerly(self) -> None:
        plan = TritonMlaBackend.extend_plan

        def reads_the_host(backend: TritonMlaBackend, forward_batch: Any, members: list[int]) -> Any:
            if forward_batch.bounds is not None:
                max(forward_batch.seq_lens_cpu, default=0)
            return plan(backend, forward_batch, members)

        wanted = self.tokens(self.engine("dsv3", disable_piecewise_cuda_graph=True))
        with mock.patch.object(TritonMlaBackend, "extend_plan", reads_the_host):
            engine = self.engine("dsv3")
            told = engine.runner.describe()["graphs"]["extend"]
            self.assertEqual((told["captured"], sorted(told["refused"])), ([], ["1", "24", "8", "96"]))
            self.assertIn("a host-side list of the batch is read", told["refused"]["24"])
            self.assertEqual(self.tokens(engine), wanted)

    def test_a_replayed_step_is_described_like_an_eager_one(self) -> None:
        engine = self.engine("q35moe-ns")
        graphs, batch = self.graphs(engine), self.batch([3, 1, 5], [0, 4, 2])
        batch = replace(batch, successors=[7, -1, -1], logprobs=[None, LogprobRequest(top_k=2), None])
        step = engine.runner.forward(batch)
        eager = ForwardBatch.from_worker_batch(batch, engine.runner.device, engine.runner.attn_backend)
        self.assertEqual(graphs.bucket_for(batch), 24)
        for name, value in vars(eager).items():
            found = getattr(step.forward_batch, name)
            with self.subTest(name):
                if isinstance(value, torch.Tensor):
                    self.assertEqual(found.tolist(), value.tolist())
                elif name != "wants_hidden":
                    self.assertEqual(found, value)
        self.assertEqual(step.output.next_token_logits.shape[0], 3)
        self.assertIsNone(step.bucket)

    def batch(self, new: list[int], cached: list[int]) -> ModelWorkerBatch:
        """Requests of the first rows of the table, in slots that nobody uses."""
        total, ends = sum(new), [a + b for a, b in zip(new, cached, strict=True)]
        ids, slots = torch.arange(total) + 3, torch.arange(total) + 1
        rows = list(range(len(new)))
        return ModelWorkerBatch.extend(rows, cached, ends, ids, slots, [row + 1 for row in rows])

    def test_larger_steps_take_more_requests(self) -> None:
        settings = {"max_running_requests": 24, "piecewise_cuda_graph_tokens": [16, 512], "chunked_prefill_size": 512}
        answers = []
        for graphs in ({"disable_cuda_graph": True}, {}):
            engine = self.engine("q35moe-ns", **settings, **graphs)
            for number in range(14):
                engine.submit(f"{number}", list(range(5, 6 + number % 17)), GREEDY)
            with mock.patch.object(ExtendGraphs, "run", autospec=True, side_effect=ExtendGraphs.run) as run:
                answers.append({rid: result.output_ids for rid, result in engine.run().items()})
        self.assertEqual(answers[0], answers[1])
        self.assertEqual(self.graphs(engine).bucket_for(self.batch([2] * 16, [1] * 16)), 512)
        self.assertIsNone(self.graphs(engine).bucket_for(self.batch([2] * 17, [1] * 17)))
        self.assertEqual(run.call_count, 1)

    def test_small_tables_contexts_and_pools(self) -> None:
        for settings in (
            {"max_running_requests": 1, "context_length": 17},
            {"max_running_requests": 2, "context_length": 65, "max_total_tokens": 32},
            {"context_length": 40, "page_size": 16, "max_total_tokens": 48, "max_running_requests": 3},
        ):
            with self.subTest(**settings):
                wanted = self.tokens_of_short(self.engine("dsv3", disable_cuda_graph=True, **settings))
                engine = self.engine("dsv3", cuda_graph_bs=None, piecewise_cuda_graph_tokens=None, **settings)
                graphs = self.graphs(engine)
                self.assertEqual(graphs.refused, {})
                self.assertLessEqual(graphs.captured[-1], engine.runner.pools.size())
                self.assertEqual(self.tokens_of_short(engine), wanted)

    def tokens_of_short(self, engine: EngineHarness) -> list[list[int]]:
        for length in (1, 9, 3, 12):
            engine.submit(f"{length}", list(range(5, 5 + length)), GREEDY)
        return [result.output_ids for _, result in sorted(engine.run().items())]

    def test_which_steps_are_replayed(self) -> None:
        graphs = self.graphs(self.engine("dsv3"))
        one = self.batch([20], [0])
        self.assertEqual(graphs.bucket_for(one), 24)
        self.assertEqual(graphs.bucket_for(self.batch([1] * MIN_REQUESTS, [3] * MIN_REQUESTS)), 8)
        scored = LogprobRequest(input_start=0, input_target_ids=(3,))
        for reason, batch in {
            "too many requests": self.batch([2] * (MIN_REQUESTS + 1), [3] * (MIN_REQUESTS + 1)),
            "too many tokens": self.batch([97], [0]),
            "prompt log-probabilities": replace(one, logprobs=[scored]),
            "attention groups": replace(one, global_num_tokens=[20, 3]),
            "too long contexts": self.batch([1], [MAX_CONTEXT]),
            "a decode step": ModelWorkerBatch.uniform(DECODE, [0], [3], torch.tensor([5])),
            "no request": ModelWorkerBatch.idle(),
        }.items():
            with self.subTest(reason):
                self.assertIsNone(graphs.bucket_for(batch))

    def test_latent_attention_is_replayed_unless_the_other_form_saves_much(self) -> None:
        backend = self.engine("dsv3", piecewise_cuda_graph_tokens=[8]).runner.attn_backend
        self.assertIsInstance(backend, TritonMlaBackend)
        saved = backend.use_mha.saved(2000, 9000) * backend.num_heads
        self.assertGreater(saved, 0)
        batch = self.batch([2000, 1], [7000, 3])
        for most, replays in ((saved, True), (saved - 1, False)):
            with mock.patch("sglang.srt.layers.attention.pool_backend.MAX_CAPTURED_EXTRA", most):
                self.assertEqual(backend.replays_extend(batch), replays)


class TestSettings(CustomTestCase):
    def test_buckets(self) -> None:
        self.assertEqual(extend_buckets(1100), [8, 16, 32, 64, 128, 256, 512, 768, 1024, 1100])
        self.assertEqual(extend_buckets(64)[-2:], [32, 64])
        self.assertEqual((extend_buckets(7), extend_buckets(1)), ([7], [1]))
        self.assertEqual(extend_buckets(64, [40, 8, 100]), [8, 40])

    def test_flags(self) -> None:
        args = ServerArgs(chunked_prefill_size=512, page_size=1)
        self.assertEqual(extend_graph_buckets(args)[-1], 512)
        for settings, wanted in (
            ({"chunked_prefill_size": -1}, 2048),
            ({"chunked_prefill_size": 8192}, 2048),
            ({"piecewise_cuda_graph_max_tokens": 100}, 100),
            ({"piecewise_cuda_graph_tokens": [64, 300]}, 300),
            ({"chunked_prefill_size": 8192, "piecewise_cuda_graph_tokens": [4096]}, 4096),
        ):
            with self.subTest(**settings):
                self.assertEqual(extend_graph_buckets(replace(args, **settings))[-1], wanted)
        for settings in (
            {"disable_cuda_graph": True},
            {"disable_piecewise_cuda_graph": True},
            {"piecewise_cuda_graph_tokens": [600]},
            {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
            {"tp_size": 2, "ep_size": 2, "moe_a2a_backend": "mori"},
        ):
            with self.subTest(**settings):
                self.assertEqual(extend_graph_buckets(replace(args, **settings)), [])


if __name__ == "__main__":
    unittest.main()
