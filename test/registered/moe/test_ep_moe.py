"""Experts spread over ranks give the result of all experts on one rank, for every layout and every load."""

from __future__ import annotations

import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ep_checks import CHECKS, GATHERED, MORI, build, compare
from sglang.test.ep_world import MODEL, check_portable
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=8, suite="stage-b-test-cpu")


class TestEpMoE(CustomTestCase):
    def test_identity(self):
        torch.set_num_threads(1)
        for name, check in CHECKS.items():
            with self.subTest(check=name):
                check()

    def test_all_reduce_experts(self):
        for ep in (1, 2, 4):
            states, layers = build(4, 1, ep=ep, **GATHERED)
            compare(states, layers, MODEL.step([6]))

    def test_what_cannot_be_served(self):
        with self.assertRaisesRegex(ValueError, "needs --ep-size 2"):
            build(2, 2, ep=1, **MORI)
        with self.assertRaisesRegex(ValueError, "PREALLOC_MAX_RECV_TOKENS=33 must be 0"):
            build(2, 2, cap=33, **MORI)

    def test_the_portable_transport_between_processes(self):
        run_processes(4, check_portable)


if __name__ == "__main__":
    unittest.main()
