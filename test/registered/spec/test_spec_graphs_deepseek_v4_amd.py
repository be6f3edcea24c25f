"""On a GPU: speculation of DeepSeek V4 with captured steps gives the tokens of plain eager steps."""

import tempfile
import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.environ import envs
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import SWITCHES, difference, prompts_around, serve

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd-mi35x")


# The CPU sibling is test_spec_graphs_deepseek_v4.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestOnGpu(CustomTestCase):
    def setUp(self):
        torch.backends.cuda.matmul.allow_tf32 = False
        self.enterContext(fresh_decisions())

    def check(self, folder, lengths, vocab_size):
        """Graphs with and without overlap, and no graphs, against plain eager steps; all in float32."""
        prompts = prompts_around(lengths, vocab_size=vocab_size)
        wanted, _ = serve(folder, prompts, dtype="float32", disable_cuda_graph=True)
        for settings in (
            {"cuda_graph_bs": [1, 4, 16]},
            {"cuda_graph_bs": [2, 16], "overlap": True},
            {"disable_cuda_graph": True},
        ):
            with self.subTest(folder=folder, **settings):
                found, _ = serve(folder, prompts, 3, dtype="float32", **settings)
                self.assertEqual(difference(found, wanted, 1e-4), "")

    def test_answers_with_captured_steps(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(folder)
        self.check(folder, (1, 124, 126, 127, 252, 255, 511), 512)

    def test_the_embedded_model(self):
        """Under the switches of the model too."""
        folder, lengths = str(EMBEDDED_MODELS["deepseek-v4-tiny"]), (2, 125, 254, 509, 700)
        self.check(folder, lengths, 256)
        prompts = prompts_around(lengths, vocab_size=256)
        wanted, _ = serve(folder, prompts, dtype="float32", disable_cuda_graph=True)
        for name, value in SWITCHES:
            for steps in (0, 3):
                with self.subTest(**{name: value}, steps=steps), getattr(envs, name).override(value):
                    found, _ = serve(folder, prompts, steps, dtype="float32", cuda_graph_bs=[1, 4, 16], overlap=True)
                    self.assertEqual(difference(found, wanted, 1e-4), "")


if __name__ == "__main__":
    unittest.main()
