"""On a GPU: fused, overlapping and serial shared experts give the same tokens; on ROCm also by AITER.

Its CPU sibling, over fakes, is test_shared_fusion.py.
"""

import unittest

import torch

from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.shared_fusion_cases import SharedFusionCases
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd-mi35x")


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestSharedFusionOnGpu(SharedFusionCases, CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    @unittest.skipUnless(torch.version.hip, "needs an AMD GPU")
    def test_by_aiter(self):
        real_vendor("aiter.fused_moe")
        self.check_aiter()


if __name__ == "__main__":
    unittest.main()
