"""On a GPU: captured steps of speculation give the tokens and drafts of eager ones, and overlap changes neither."""

from __future__ import annotations

import unittest
from typing import Any

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.spec_graph_cases import VerifyCases
from sglang.test.sync_guard import forbid_waits
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd-mi35x")


# The CPU siblings are test_spec_graphs and test_spec_identity.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestOnGpu(VerifyCases, CustomTestCase):
    def setUp(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.enterContext(fresh_decisions())

    def engine(self, num_steps: int = 3, **settings: Any) -> EngineHarness:
        return super().engine(num_steps, **{"overlap": True, **settings})

    def test_overlap_changes_no_token(self) -> None:
        self.assertEqual(self.tokens(self.engine(3)), self.tokens(self.engine(3, overlap=False)))

    def test_a_step_never_waits_for_the_device(self) -> None:
        """Verify, acceptance and drafts are queued; only the result of the step before is waited for."""
        engine = self.engine(3)
        self.tokens(engine)
        forbid_waits(engine.scheduler.worker, prompts=False)
        self.tokens(engine)


class TestWithStatesOnGpu(TestOnGpu):
    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])


if __name__ == "__main__":
    unittest.main()
