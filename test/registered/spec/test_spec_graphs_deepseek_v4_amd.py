"""On a GPU: speculation of DeepSeek V4 with captured steps gives the tokens of plain eager steps."""

import tempfile
import unittest

import torch

from sglang.kernels.registry import fresh_decisions
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import difference, prompts_around, serve

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd-mi35x")


# The CPU sibling is test_spec_graphs_deepseek_v4.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestOnGpu(CustomTestCase):
    def test_answers_with_captured_steps(self):
        torch.backends.cuda.matmul.allow_tf32 = False
        self.enterContext(fresh_decisions())
        folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(folder)
        prompts = prompts_around((1, 124, 126, 127, 252, 255, 511))
        wanted, _ = serve(folder, prompts, dtype="float32", disable_cuda_graph=True)
        found, _ = serve(folder, prompts, 3, dtype="float32", cuda_graph_bs=[1, 4, 16])
        self.assertEqual(difference(found, wanted, 1e-4), "")


if __name__ == "__main__":
    unittest.main()
