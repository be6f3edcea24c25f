"""Tokens with and without speculation are the same for DeepSeek V4, whose pages a shared beginning fills."""

import random
import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.spec_matrix import SpecMatrix, all_cases, covering
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import prose

register_cpu_ci(est_time=120, suite="nightly-cpu", nightly=True)

# A page and a few tokens; twice that is more than what the indexer chooses.
SHARED = prose(random.Random("shared"), 263) + ";"


class TestSchedules(CustomTestCase):
    def test_every_two_settings_together(self):
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # matrices are small
        matrix = SpecMatrix(str(EMBEDDED_MODELS["deepseek-v4-tiny"]), SHARED, 8192, 256)
        for case in covering(all_cases()):
            with self.subTest(case):
                matrix.check(self, case)


if __name__ == "__main__":
    unittest.main()
