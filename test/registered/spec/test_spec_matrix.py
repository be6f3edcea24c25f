"""Tokens with and without speculation are the same for a model with recurrent states, whatever the schedule."""

import unittest

import torch

from sglang.embedded_models import default_model_path
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.spec_matrix import SpecMatrix, all_cases, covering
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=25, suite="stage-b-test-cpu")

QWEN = str(default_model_path().parent / "qwen3.5-moe-tiny")


class TestSchedules(CustomTestCase):
    def setUp(self):
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # matrices are small

    def test_every_two_settings_together(self):
        matrix, cases = SpecMatrix(QWEN), covering(all_cases())
        for case in cases:
            with self.subTest(case):
                matrix.check(self, case)


if __name__ == "__main__":
    unittest.main()
