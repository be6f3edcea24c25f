"""The AMD tests of this folder over MORI's fake, and with four ranks: the HIP path of expert parallelism on a CPU."""

from __future__ import annotations

import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ep_world import check_mori
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=16, suite="stage-b-test-cpu")


class TestMoriOverTheFake(CustomTestCase):
    def test_identity(self) -> None:
        for world in (1, 2, 4):
            with self.subTest(world=world):
                run_processes(world, lambda rank, world=world: check_mori(rank, world, fake=True))


if __name__ == "__main__":
    unittest.main()
