"""Speculation over attention groups and spread experts gives the tokens of one rank without it, with any group idle."""

from __future__ import annotations

import unittest
from functools import partial

import torch

from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.group_ranks import TwoGroups
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=25, suite="stage-b-test-cpu")


class TestTwoGroups(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.two = TwoGroups.of_embedded("deepseek-v3-tiny")

    def test_gathered_rows(self) -> None:
        run_processes(2, self.two.serve)

    def test_exchanged_rows_in_rounds(self) -> None:
        run_processes(2, partial(self.two.serve_capped, cap=6, deepep_mode="low_latency"))

    def test_spread_experts_of_one_group(self) -> None:
        run_processes(2, partial(self.two.serve_capped, cap=0, groups=1, num_steps=1))

    def test_captured_steps(self) -> None:
        """Groups under HIP's policy on a CPU, whose graphs repeat the recorded calls."""
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            run_processes(2, self.two.replay)


if __name__ == "__main__":
    unittest.main()
