"""On a GPU: 5,000 requests to the embedded DeepSeek V4 with drafts, 64 at once, each answered as when it was alone."""

import unittest

import torch

from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_soak import soak

register_cuda_ci(est_time=240, suite="nightly-1-gpu", nightly=True)
register_amd_ci(est_time=600, suite="nightly-amd-1-gpu", nightly=True)


# The CPU sibling is test_deepseek_v4_soak_nightly.
@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestSoak(CustomTestCase):
    def test_5000_requests(self):
        done = soak(250, 5000, 64, dtype="float32")
        print(f"{len(done.differing)} differ; {done[1:]}")
        self.assertEqual(done.differing, [])
        self.assertEqual(set(done.left.values()), {0})
        self.assertGreater(done.cached_tokens, 0)
        self.assertGreater(done.accepted_drafts, 0)


if __name__ == "__main__":
    unittest.main()
