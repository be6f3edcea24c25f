"""What served models must answer whether shared experts are fused, overlap or run before: on a device or a host."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from sglang.kernels.registry import REGISTRY
from sglang.srt.arg_groups.stream_policy import SITE_RULES
from sglang.srt.environ import envs
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness, numbers
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import KERNEL_SIZED_CONFIGS

ARCHITECTURES = {"dsv3-k": "DeepseekV3ForCausalLM", "q35moe-k": "Qwen3_5MoeForCausalLM"}
FUSED: dict[str, Any] = {}
APART: dict[str, Any] = {"disable_shared_experts_fusion": True}
# Settings, and what SGLANG_STREAM_SITES says of every site.
MODES = ((FUSED, "off"), (FUSED, "on"), (APART, "off"), (APART, "on"))
# Tokens, their log-probabilities and those of the prompt, by request.
Answers = dict[str, tuple[list[int], list[float], list[float]]]


class SharedFusionCases(CustomTestCase):
    """Random weights by name, so that both forms of a model serve the same ones."""

    def serve(self, name: str, dtype: str, sites: str, **settings: Any) -> tuple[Answers, ModelRunner]:
        """The answers to a few prompts that decode together, and their runner."""
        forced = ",".join(f"{rule.name}={sites}" for rule in SITE_RULES)
        options = {"max_total_tokens": 1024, "max_running_requests": 4, "random_seed": 1, "load_format": "dummy"}
        with tempfile.TemporaryDirectory() as folder, envs.SGLANG_STREAM_SITES.override(forced):
            config = {**KERNEL_SIZED_CONFIGS[name], "architectures": [ARCHITECTURES[name]]}
            Path(folder, "config.json").write_text(json.dumps(config))
            engine = EngineHarness(folder, skip_tokenizer_init=True, dtype=dtype, **{**options, **settings})
            generator = random.Random(5)
            params = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
            for number, length in enumerate((1, 7, 40)):
                prompt = [generator.randrange(3, 512) for _ in range(length)]
                engine.submit(f"r{number}", prompt, params, return_logprob=True, logprob_start_len=0)
            results = engine.run()
        answers: Answers = {}
        for rid, found in results.items():
            assert found.input_logprobs is not None
            drawn, fed = found.output_logprobs.logprobs, found.input_logprobs.logprobs[1:]
            answers[rid] = (found.output_ids, numbers(drawn), numbers(fed))
        return answers, engine.runner

    def assert_alike(self, found: Answers, wanted: Answers, bound: float) -> None:
        """The same tokens, at log-probabilities within ``bound``."""
        for rid, (tokens, *logprobs) in wanted.items():
            self.assertEqual(found[rid][0], tokens)
            for ours, theirs in zip(found[rid][1:], logprobs, strict=True):
                self.assert_near(ours, theirs, bound)

    def assert_near(self, found: list[float], wanted: list[float], bound: float) -> None:
        self.assertLess(max((abs(a - b) for a, b in zip(found, wanted, strict=True)), default=0.0), bound)

    def test_no_mode_changes_a_token(self) -> None:
        for name in ARCHITECTURES:
            with fresh_decisions():
                wanted, runner = self.serve(name, "float32", "off", **APART)
            self.assertEqual(runner.model.num_fused_shared_experts, 0)
            for settings, sites in MODES:
                for eager in (False, True):
                    with self.subTest(model=name, sites=sites, eager=eager, **settings), fresh_decisions():
                        found, runner = self.serve(name, "float32", sites, disable_cuda_graph=eager, **settings)
                        self.assert_alike(found, wanted, 1e-4)
                        self.assertEqual(runner.model.num_fused_shared_experts, int(settings is FUSED))
                        shown = runner.describe()
                        self.assertEqual(shown["streams"]["shared_expert_fusion"]["enabled"], settings is FUSED)
                        form = "by the modes of its site" if settings is FUSED else "apart"
                        self.assertEqual(shown["experts"]["shared"]["form"], form)

    def check_aiter(self) -> None:
        """By AITER, whose layout leaves a fused model no other form; float16, as bfloat16 lets routers choose again."""
        for name in ARCHITECTURES:
            with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
                wanted, _ = self.serve(name, "float16", "off", **APART)
            with envs.SGLANG_USE_AITER.override(True), fresh_decisions():
                found, runner = self.serve(name, "float16", "off")
                self.assertEqual(REGISTRY.chosen(REGISTRY.ops["moe.fused_experts"]), "aiter")
                self.assertEqual(REGISTRY.records["moe.fused_experts"].calls_refused, {})
            shown = runner.describe()["experts"]["shared"]
            self.assertEqual((shown["slots"], "layout" in shown["form"]), (1, True))
            streams = runner.describe()["streams"]
            self.assertTrue(streams["shared_expert_fusion"]["enforced"])
            (site,) = [site for site in streams["sites"].values() if site["modes"]]
            self.assertEqual((site["modes"], site["enabled"]), ([{"max_tokens": None, "mode": "fused"}], False))
            self.assertIn("layout", site["reason"])
            # Random weights leave the choice of a token to the last bits: the prompt is what both were fed.
            for rid, (_, _, logprobs) in wanted.items():
                self.assert_near(found[rid][2], logprobs, 0.05)
