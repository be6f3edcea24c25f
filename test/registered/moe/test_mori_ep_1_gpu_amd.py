"""One expert rank over MORI on an AMD GPU: its kernels through the layer, against the torch reference."""

from __future__ import annotations

import unittest

import torch

from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.ep_world import check_mori
from sglang.test.process_ranks import run_processes
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd-mi35x")


@unittest.skipUnless(torch.version.hip and torch.cuda.is_available(), "needs an AMD GPU")
class TestMoriOneGpu(CustomTestCase):
    def test_identity(self) -> None:
        real_vendor("mori.ops")
        run_processes(1, lambda rank: check_mori(rank, 1, fake=False))


if __name__ == "__main__":
    unittest.main()
