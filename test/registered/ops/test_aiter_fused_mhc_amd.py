"""From sub-block to sub-block by AITER on an AMD GPU against the torch reference."""

from __future__ import annotations

import unittest

import torch

from sglang.test import aiter_mhc_cases
from sglang.test.ci.ci_register import register_amd_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=120, suite="stage-b-test-1-gpu-small-amd-mi35x")


def arch() -> str:
    return torch.cuda.get_device_properties(0).gcnArchName if torch.version.hip and torch.cuda.is_available() else ""


@unittest.skipUnless(arch().startswith("gfx95"), "AITER's mHC kernels are used on gfx95x alone")
class TestAiterFusedMhc(aiter_mhc_cases.AiterMhcCases, CustomTestCase):
    device = "cuda"
    widths = (4096, 7168)

    @classmethod
    def setUpClass(cls) -> None:
        real_vendor("aiter.ops.mhc")
        real_vendor("aiter.ops.triton.fusions.mhc")


if __name__ == "__main__":
    unittest.main()
