"""The experts by AITER on an AMD GPU against the torch references."""

from __future__ import annotations

import unittest

from sglang.srt.utils.common import is_hip
from sglang.test import aiter_moe_cases
from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.test_utils import CustomTestCase

register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd")


@unittest.skipUnless(is_hip(), "needs an AMD GPU")
class TestAiterFusedMoe(aiter_moe_cases.AiterMoeCases, CustomTestCase):
    device = "cuda"
    hidden, width = 2048, 768

    @classmethod
    def setUpClass(cls) -> None:
        try:
            from aiter.fused_moe import fused_moe  # noqa: F401
        except Exception as error:  # AITER fails with more than ImportError
            raise unittest.SkipTest(f"aiter does not import: {error}") from error


if __name__ == "__main__":
    unittest.main()
