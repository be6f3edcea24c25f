"""The experts by AITER on an AMD GPU against the torch references."""

from __future__ import annotations

import unittest

import torch

from sglang.test import aiter_moe_cases
from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd-mi35x")


ON_AMD = bool(torch.version.hip) and torch.cuda.is_available()


@unittest.skipUnless(ON_AMD, "needs an AMD GPU")
class TestAiterFusedMoe(aiter_moe_cases.AiterMoeCases, CustomTestCase):
    device = "cuda"
    hidden, width = 2048, 768

    @classmethod
    def setUpClass(cls) -> None:
        real_vendor("aiter.fused_moe")


@unittest.skipUnless(ON_AMD and torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx950"), "needs a gfx950")
class TestAiterFourBit(aiter_moe_cases.AiterFourBitCases, CustomTestCase):
    device = "cuda"

    @classmethod
    def setUpClass(cls) -> None:
        real_vendor("aiter.utility.fp4_utils")


if __name__ == "__main__":
    unittest.main()
