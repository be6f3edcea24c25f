"""Tokens with and without speculation are the same for DeepSeek V3: every combination of settings."""

import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.spec_matrix import SpecMatrix, nightly_cases
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=900, suite="nightly-cpu", nightly=True)


class TestAllSchedules(CustomTestCase):
    def test_every_combination(self):
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # matrices are small
        matrix = SpecMatrix(str(EMBEDDED_MODELS["deepseek-v3-tiny"]))
        for case in nightly_cases():
            with self.subTest(case):
                matrix.check(self, case)


if __name__ == "__main__":
    unittest.main()
