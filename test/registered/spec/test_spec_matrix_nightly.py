"""Tokens with and without speculation are the same: every combination of settings, on both kinds of model."""

import unittest

import torch

from sglang.embedded_models import default_model_path
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.spec_matrix import SpecMatrix, all_cases
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1500, suite="nightly-cpu", nightly=True)


class TestAllSchedules(CustomTestCase):
    def check(self, name):
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # matrices are small
        matrix = SpecMatrix(str(default_model_path().parent / name))
        for case in all_cases():
            with self.subTest(case):
                matrix.check(self, case)

    def test_deepseek_v3(self):
        self.check("deepseek-v3-tiny")

    def test_qwen3_5(self):
        self.check("qwen3.5-moe-tiny")


if __name__ == "__main__":
    unittest.main()
