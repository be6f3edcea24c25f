"""On a GPU: a decode step copies once to the device and once back, whatever its requests sample and request."""

from __future__ import annotations

import tempfile
import unittest
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cuda_ci(est_time=60, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=90, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=90, suite="stage-b-test-1-gpu-small-amd-mi35x")

NUM_STEPS = 8
GREEDY = {"temperature": 0.0}
RANDOM = {"temperature": 1.0, "top_p": 0.9, "sampling_seed": 3}
PENALISED = {"temperature": 0.7, "top_k": 20, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
SCORED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3, "token_ids_logprob": [5, 7]}
# The requests of a batch: sampling parameters, and what each asks next to its tokens.
BATCHES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "greedy": [(GREEDY, {})] * 3,
    "random": [(RANDOM, {}), (GREEDY, {})],
    "with log-probabilities": [(RANDOM, SCORED), (GREEDY, {}), (GREEDY, SCORED)],
    "penalised": [(PENALISED, SCORED), (GREEDY, {})],
}


def copies(events: Any) -> Counter[str]:
    """Copies between host and device by direction, as the device ran them."""
    found: Counter[str] = Counter()
    for event in events:
        for way in ("HtoD", "DtoH"):
            found[way] += event.name.startswith(f"Memcpy {way}")
    return found


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestStepCopies(CustomTestCase):
    def test_one_copy_each_way(self) -> None:
        prompts = [[7, 8, 9, 10], list(range(20, 60)), [3] * 5]
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_checkpoint("dsv3-k", folder)
            for eager in (False, True):
                with fresh_decisions():
                    engine = EngineHarness(
                        folder, overlap=True, max_total_tokens=4096, max_running_requests=4, disable_cuda_graph=eager
                    )
                    for name, batch in BATCHES.items():
                        with self.subTest(batch=name, eager=eager):
                            found = self.decode(engine, batch, prompts)
                            print(f"{name}, eager={eager}: {dict(found)} in {NUM_STEPS} steps")
                            self.assertEqual(found, Counter(HtoD=NUM_STEPS, DtoH=NUM_STEPS))

    def decode(
        self, engine: EngineHarness, batch: list[tuple[dict[str, Any], dict[str, Any]]], prompts: list[list[int]]
    ) -> Counter[str]:
        for number, (params, asked) in enumerate(batch):
            sampling = SamplingParams(max_new_tokens=24, ignore_eos=True, **params)
            engine.submit(f"r{number}", prompts[number], sampling, **asked)
        for _ in range(6):
            engine.step()  # the prompts, and the first decode steps of this batch
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(NUM_STEPS):
                engine.step()
            torch.cuda.synchronize()
        self.assertEqual(len(engine.scheduler.running_reqs), len(batch))
        engine.run()
        engine.results.clear()
        return copies(recorded.events())


if __name__ == "__main__":
    unittest.main()
