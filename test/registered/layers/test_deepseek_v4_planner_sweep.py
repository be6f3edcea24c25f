"""The device's plan of a step of compressed attention against a loop over tokens, on 10,000 batches."""

import random
import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.deepseek_v4_plan_truth import check_plan, random_batch
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=500, suite="nightly-cpu", nightly=True)


class TestPlanSweep(CustomTestCase):
    def test_random_batches(self):
        rng = random.Random(2)
        for _ in range(10_000):
            check_plan(random_batch(rng))


if __name__ == "__main__":
    unittest.main()
