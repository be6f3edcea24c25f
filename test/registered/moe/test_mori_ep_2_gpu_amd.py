"""Two expert ranks over MORI on AMD GPUs: rows really travel, and the sums are those of the torch reference."""

from __future__ import annotations

import unittest

import torch

from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.ep_world import check_mori
from sglang.test.process_ranks import run_processes
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_amd_ci(est_time=180, suite="stage-b-test-2-gpu-large-amd")
register_amd_ci(est_time=180, suite="stage-c-test-large-8-gpu-amd-mi35x")


@unittest.skipUnless(torch.version.hip and torch.cuda.is_available(), "needs two AMD GPUs")
class TestMoriTwoGpus(CustomTestCase):
    def test_identity(self) -> None:
        real_vendor("mori.ops")
        self.assertGreaterEqual(torch.cuda.device_count(), 2, "GPUs")
        run_processes(2, lambda rank: check_mori(rank, 2, fake=False))


if __name__ == "__main__":
    unittest.main()
