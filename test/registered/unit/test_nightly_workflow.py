"""The nightly workflow runs the whole long suite, and its command installs the clients that the suite drives."""

import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

from sglang.test.ci.ci_register import register_cpu_ci, valid_suites
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]


class TestNightly(CustomTestCase):
    def setUp(self) -> None:
        self.job = yaml.safe_load((REPO / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]["suites"]
        self.command = self.job["steps"][-1]["run"]

    def test_every_suite_and_partition_is_run(self) -> None:
        self.assertEqual(re.findall(r"--suite (\S+)", self.command), list(valid_suites("cpu", nightly=True)))
        (size,) = re.findall(r"--auto-partition-size (\d+)", self.command)
        self.assertEqual(self.job["strategy"]["matrix"]["partition"], list(range(int(size))))
        self.assertIn("--auto-partition-id ${{ matrix.partition }}", self.command)

    def test_clients_are_installed_for_it_alone(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            script = shutil.copy(REPO / "scripts" / "test.sh", folder)
            Path(folder, "lib.sh").write_text('ensure_venv() { echo "$1"; exit; }\n')
            for command, extras in (
                (self.command.replace("${{ matrix.partition }}", "0"), "test,clients"),
                ("scripts/test.sh --suite nightly-cpu --nightly", "test,clients"),
                ("scripts/test.sh --suite stage-a-test-cpu --jobs 2", "test"),
                ("scripts/test.sh --install-only", "test"),
            ):
                name, *arguments = command.split()
                self.assertEqual(name, "scripts/test.sh")
                done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=True)
                self.assertEqual(done.stdout.strip(), extras, command)


if __name__ == "__main__":
    unittest.main()
