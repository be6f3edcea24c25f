"""On a GPU: grammars hold in captured verify steps, overlap changes no token, and such a step never waits."""

from __future__ import annotations

import unittest
from typing import Any

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.spec_grammar_cases import has_form, serve_forms
from sglang.test.sync_guard import forbid_waits
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd-mi35x")


# The CPU sibling is test_spec_grammars.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestOnGpu(CustomTestCase):
    folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])

    def setUp(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.enterContext(fresh_decisions())
        self.tokenizer = Tokenizer.from_path(self.folder)

    def engine(self, **settings: Any) -> EngineHarness:
        options = {"max_running_requests": 6, "max_total_tokens": 1024, "random_seed": 1, "dtype": "float32"}
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
        return EngineHarness(self.folder, with_tokenizer=True, **{**options, **spec, **settings})

    def tokens(self, engine: EngineHarness) -> dict[str, list[int]]:
        engine.results.clear()  # which add up where an engine serves again
        results = serve_forms(engine, self.tokenizer)
        for rid, result in results.items():
            ids = [i for i in result.output_ids if i not in self.tokenizer.eos_token_ids]
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            self.assertTrue(has_form(rid, text), (rid, text))
        self.assertGreater(engine.scheduler.metrics.num_accepted_drafts, 0)
        return {rid: result.output_ids for rid, result in results.items()}

    def test_overlap_changes_no_token(self) -> None:
        self.assertEqual(self.tokens(self.engine(overlap=True)), self.tokens(self.engine(overlap=False)))

    def test_a_step_never_waits_for_the_device(self) -> None:
        """A verify step with grammars waits only for its drafts and for the result of the step before."""
        engine = self.engine(overlap=True)
        self.tokens(engine)
        forbid_waits(engine.scheduler.worker, prompts=False)
        self.tokens(engine)


class TestWithStatesOnGpu(TestOnGpu):
    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])


if __name__ == "__main__":
    unittest.main()
