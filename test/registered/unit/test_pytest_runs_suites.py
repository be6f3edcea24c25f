"""pytest over the folder of tests runs the files of the CPU suites of each commit, and no others, each as a process."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import CPU_SUITES, collect_tests, register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
FILE = """
import os, sys, unittest
from sglang.test.ci.ci_register import {function}
{function}(est_time=1, suite="{suite}"{more})
os.environ["PLANTED"] = os.environ.get("PLANTED", "") + "x"
class TestPlanted(unittest.TestCase):
    def test_the_process_is_its_own(self):
        self.assertEqual(os.environ["PLANTED"], "x")
        self.assertTrue({good}, "planted failure")
if __name__ == "__main__":
    unittest.main()
"""


def pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what happens to be installed takes seconds to load
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *words]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


class TestCollection(CustomTestCase):
    def test_of_this_tree(self):
        found = collect_tests((REPO / "test/registered").rglob("*.py"), root=REPO)
        wanted = {one.filename for one in found if one.backend == "cpu" and one.suite in CPU_SUITES}
        done = pytest(REPO, "--collect-only", "test/registered")
        self.assertEqual(done.returncode, 0, done.stdout)
        shown = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
        self.assertGreater(len(wanted), 150)
        self.assertEqual(shown ^ wanted, set())


class TestPlantedFiles(CustomTestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.root / "python").symlink_to(REPO / "python")
        (self.root / "test/registered").mkdir(parents=True)
        (self.root / "test/conftest.py").write_text((REPO / "test/conftest.py").read_text())

    def plant(self, name: str, good: bool = True, function: str = "register_cpu_ci", suite: str = "", more: str = ""):
        text = FILE.format(function=function, suite=suite or CPU_SUITES[0], more=more, good=good)
        (self.root / "test/registered" / name).write_text(text)

    def test_each_file_has_a_process(self):
        self.plant("test_one.py")
        self.plant("test_two.py", suite=CPU_SUITES[1])
        done = pytest(self.root, "test/registered")
        self.assertEqual((done.returncode, "2 passed" in done.stdout), (0, True), done.stdout)

    def test_what_is_not_of_each_commit_is_left_out(self):
        self.plant("test_one.py")
        self.plant("test_night.py", good=False, suite="nightly-cpu", more=", nightly=True")
        self.plant("test_gpu.py", good=False, function="register_cuda_ci", suite="stage-b-test-1-gpu-small")
        self.plant("test_off.py", good=False, more=', disabled="planted"')
        done = pytest(self.root, "test/registered")
        self.assertEqual((done.returncode, "1 passed" in done.stdout), (0, True), done.stdout)
        # Named alone, a file runs whatever it is registered for.
        self.assertIn("planted failure", pytest(self.root, "test/registered/test_night.py").stdout)

    def test_a_failure_is_shown(self):
        self.plant("test_bad.py", good=False)
        done = pytest(self.root, "test/registered")
        self.assertEqual(done.returncode, 1)
        for part in ("planted failure", "test_bad.py", "1 failed"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main()
