"""Captured steps of speculation under HIP's policy on a CPU: one draft, two, and next to recurrent states."""

from __future__ import annotations

import unittest

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.spec_graph_cases import VerifyCases
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=150, suite="nightly-cpu", nightly=True)


class TestVerify(VerifyCases, CustomTestCase):
    STEPS = (1, 5)

    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())


class TestVerifyWithStates(TestVerify):
    """Graphs of Qwen3.5, whose verify steps run on copies of recurrent states."""

    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])
    STEPS = (2,)


if __name__ == "__main__":
    unittest.main()
