"""The cases of AITER's greedy sampling over the fake, under the ROCm policy on the CPU."""

from __future__ import annotations

import unittest
from unittest import mock

import torch

from sglang.kernels.ops.sampling.greedy import greedy_aiter, greedy_sample
from sglang.srt.layers.logits_processor import RowFault
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test import aiter_greedy_cases
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

use_fakes()


class TestAiterGreedySampleOverFake(aiter_greedy_cases.AiterGreedyCases, CustomTestCase):
    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        super().setUp()

    def test_unguarded_kernel_goes_past_the_vocabulary(self) -> None:
        """The reason for the guard: lanes past V read 0 and beat every negative logit."""
        from aiter import greedy_sample as kernel

        vocab = aiter_greedy_cases.UNSAFE_VOCABULARY
        logits = -self.random(3, vocab).abs() - 1
        ids = torch.empty(3, dtype=torch.int32)
        kernel(ids, logits)
        self.assertTrue(bool((ids >= vocab).all()))
        self.assertLess(int(greedy_sample(logits)[0].max()), vocab)

    def test_ids_outside_the_vocabulary_end_their_rows(self) -> None:
        """Whatever the kernel says, no id is made up in its place, and the device gets one that it can use."""
        import aiter

        for answer in (64, 77777, 2**31 - 1, -5):

            def broken(out: torch.Tensor, logits: torch.Tensor, answer: int = answer) -> None:
                out.copy_(torch.tensor([3, answer], dtype=torch.int32))

            with mock.patch.object(aiter, "greedy_sample", broken):
                self.assertEqual(greedy_aiter(torch.zeros(2, 64))[0].tolist(), [3, answer])
                ids, output = self.sample(torch.zeros(2, 64))
            self.assertEqual(output.row_faults.tolist(), [0, RowFault.TOKEN_ID])
            self.assertEqual((int(ids[0]), ids.dtype), (3, torch.int32))
            self.assertIn(int(ids[1]), range(64))


class TestCpuIsLeftAlone(CustomTestCase):
    def test_cpu_never_asks_for_aiter(self) -> None:
        from sglang.kernels.registry import REGISTRY
        from sglang.srt.environ import envs
        from sglang.test.kernel_choice import fresh_decisions

        with envs.SGLANG_USE_AITER.override(True), fresh_decisions():
            self.assertEqual(greedy_sample(torch.zeros(1, 32))[0].dtype, torch.int64)
            self.assertIn("not for cpu", REGISTRY.records["sampling.greedy"].verdicts["aiter"])


if __name__ == "__main__":
    unittest.main()
