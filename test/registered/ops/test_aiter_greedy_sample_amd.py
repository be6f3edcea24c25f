"""AITER's greedy sampling on an AMD GPU, behind the op table and the sampler."""

from __future__ import annotations

import unittest

import torch

from sglang.test import aiter_greedy_cases
from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_amd_ci(est_time=60, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=60, suite="stage-b-test-1-gpu-small-amd-mi35x")


@unittest.skipUnless(torch.version.hip and torch.cuda.is_available(), "needs an AMD GPU")
class TestAiterGreedySample(aiter_greedy_cases.AiterGreedyCases, CustomTestCase):
    device = "cuda"
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256)

    @classmethod
    def setUpClass(cls) -> None:
        real_vendor("aiter")

    def test_twice_the_same(self) -> None:
        """The kernel reads and writes nothing else than it is given: ids repeat, call after call."""
        from sglang.kernels.ops.sampling.greedy import greedy_sample

        logits = self.random(64, 129280)
        first = greedy_sample(logits)[0].tolist()
        for _ in range(20):
            self.assertEqual(greedy_sample(logits)[0].tolist(), first)

    def test_side_stream(self) -> None:
        """Some releases launch on the default stream: on another one the next implementation has to answer."""
        logits = self.random(4, 32000)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            self.check(logits, by_aiter=False)


if __name__ == "__main__":
    unittest.main()
