"""On a GPU: the same greedy tokens in float32 whatever is switched on, and those of transformers on the host."""

from __future__ import annotations

import tempfile
import unittest
from typing import Any

import torch

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.sync_guard import forbid_waits
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import KERNEL_SIZED_CONFIGS, save_tiny_checkpoint

register_cuda_ci(est_time=120, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=240, suite="stage-b-test-1-gpu-small-amd-mi35x")

PARAMS = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
# Each is one deviation from the first: graphs and overlap, page 1, no cut prompts.
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"disable_cuda_graph": True},
    {"overlap": False},
    {"page_size": 16},
    {"page_size": 64},
    {"chunked_prefill_size": 32},
    {"disable_radix_cache": True},
    {"disable_shared_experts_fusion": True},
    {"attention_backend": "torch_native"},
    {"max_total_tokens": 200, "schedule_conservativeness": 0.01, "disable_radix_cache": True},
)


# The CPU siblings are test_scheduler_parity and test_decode_graphs.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestGpuIdentity(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        generator = torch.Generator().manual_seed(3)
        stem = torch.randint(3, 512, (140,), generator=generator).tolist()
        cls.prompts = [stem[:1], stem[5:12], stem, stem[:97], stem[:71] + stem[20:60], stem[::-1]]
        cls.truth: dict[str, list[list[int]]] = {}
        for name in KERNEL_SIZED_CONFIGS:
            hf = save_tiny_checkpoint(name, f"{cls.folder}/{name}")
            cls.truth[name] = [cls.greedy(hf, prompt) for prompt in cls.prompts]

    @staticmethod
    @torch.inference_mode()
    def greedy(hf: Any, prompt: list[int]) -> list[int]:
        out = hf.generate(torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
        return out[0, len(prompt) :].tolist()

    def run_mode(self, name: str, mode: dict[str, Any]) -> tuple[list[list[int]], EngineHarness]:
        options = {"max_total_tokens": 4096, "max_running_requests": 8, "random_seed": 1, "dtype": "float32"}
        settings = {**options, "overlap": True, **mode}
        engine = EngineHarness(f"{self.folder}/{name}", **settings)
        for number, prompt in enumerate(self.prompts):
            engine.submit(f"r{number}", prompt, PARAMS)
        results = engine.run()
        return [results[f"r{number}"].output_ids for number in range(len(self.prompts))], engine

    def test_every_mode(self) -> None:
        for name in KERNEL_SIZED_CONFIGS:
            for mode in MODES:
                with self.subTest(model=name, **mode), fresh_decisions():
                    tokens, engine = self.run_mode(name, mode)
                    self.assertEqual(tokens, self.truth[name])
                    graphs = engine.runner.decode_graphs
                    if not mode:
                        self.assertEqual(graphs.refused, {})
                    if "max_total_tokens" in mode:
                        self.assertGreater(engine.scheduler.metrics.num_retracted_reqs, 0)

    def test_a_decode_step_never_waits_for_the_device(self) -> None:
        with fresh_decisions():
            _, engine = self.run_mode("dsv3-k", {})
            engine.submit("again", self.prompts[2], PARAMS)
            engine.step()
            forbid_waits(engine.scheduler.worker)
            engine.run()


if __name__ == "__main__":
    unittest.main()
