"""Two expert ranks over MORI on AMD GPUs: rows really travel, and the sums are those of the torch reference."""

from __future__ import annotations

import unittest

from sglang.srt.utils.common import is_hip
from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.ep_world import check_mori, require_mori
from sglang.test.process_ranks import run_processes
from sglang.test.test_utils import CustomTestCase

register_amd_ci(est_time=180, suite="stage-b-test-2-gpu-large-amd")


@unittest.skipUnless(is_hip(), "needs two AMD GPUs")
class TestMoriTwoGpus(CustomTestCase):
    def test_identity(self) -> None:
        require_mori(num_gpus=2)
        run_processes(2, lambda rank: check_mori(rank, 2, fake=False))


if __name__ == "__main__":
    unittest.main()
