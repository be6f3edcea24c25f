"""Tokens with and without speculation are the same for DeepSeek V3: every combination of settings."""

import unittest

from sglang.test import spec_matrix
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=900, suite="nightly-cpu", nightly=True)


class TestAllSchedules(spec_matrix.EverySchedule):
    model = "deepseek-v3-tiny"


if __name__ == "__main__":
    unittest.main()
