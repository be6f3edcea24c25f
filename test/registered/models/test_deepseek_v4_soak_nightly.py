"""Mixed requests to the embedded DeepSeek V4 with drafts: each has the output of a run alone, retracted or not."""

import unittest

from sglang.srt.environ import envs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_soak import soak

register_cpu_ci(est_time=300, suite="nightly-cpu", nightly=True)


class TestSoak(CustomTestCase):
    def check(self, *counts, **server_args):
        done = soak(*counts, dtype="float32", **server_args)
        self.assertEqual(done.differing, [])
        self.assertEqual(set(done.left.values()), {0})
        self.assertGreater(done.cached_tokens, 0)
        self.assertGreater(done.accepted_drafts, 0)

    def test_many_at_once(self):
        self.check(40, 200, 16)

    def test_few_windows_and_retractions(self):
        """Windows of a quarter of the tokens are evicted, and requests are retracted now and then without need."""
        with envs.SGLANG_TEST_RETRACT.override(True), envs.SGLANG_TEST_RETRACT_INTERVAL.override(7):
            self.check(30, 80, 6, max_total_tokens=16384, swa_full_tokens_ratio=0.25, chunked_prefill_size=512)


if __name__ == "__main__":
    unittest.main()
