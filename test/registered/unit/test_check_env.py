"""Output of ``python -m sglang.check_env``."""

import os
import subprocess
import sys
import unittest
from unittest import mock

from sglang.check_env import report
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import FAKES
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestReport(CustomTestCase):
    def test_each_line_is_said_once_and_absence_is_said(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": "/nowhere", "ROCM_HOME": "/opt/rocm-x"}):
            lines = list(report())
        found = dict(lines)
        self.assertEqual(len(found), len(lines))
        self.assertEqual((found["ROCM_HOME"], found["HIPCC"]), ("/opt/rocm-x", "Not Available"))
        for name in ("sglang-amd", "PyTorch", "triton", "aiter", "mori", "GPU_MAX_HW_QUEUES"):
            self.assertTrue(found[name], name)

    def test_a_fake_is_called_one(self) -> None:
        path = os.pathsep.join([str(FAKES), str(FAKES.parents[2])])
        lines = subprocess.check_output(
            [sys.executable, "-m", "sglang.check_env"], env={**os.environ, "PYTHONPATH": path}, text=True
        ).splitlines()
        for name in ("aiter", "mori"):
            self.assertIn(f"{name}: FAKE of this project, on PYTHONPATH", lines)


if __name__ == "__main__":
    unittest.main()
