"""scripts/size.py fails on a file, function or package past its limit, and on nothing else."""

import runpy
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "size.py"


def function(lines: int, decorator: str = "") -> str:
    return f"{decorator}def long():\n" + "    x = 1\n" * (lines - 1)


class TestSize(CustomTestCase):
    def size(
        self, text: str | dict[str, str], name: str = "python/sglang/srt/utils/a.py"
    ) -> subprocess.CompletedProcess:
        """Run over a tree of one file, or of texts by name."""
        with tempfile.TemporaryDirectory() as folder:
            for file, content in (text if isinstance(text, dict) else {name: text}).items():
                path = Path(folder) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            return subprocess.run([sys.executable, str(SCRIPT), folder], capture_output=True, text=True)

    def test_at_the_limits(self):
        done = self.size(function(100) + "x = 1\n" * 400)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout, r"sglang/srt/utils     500 of +[1-9]")
        self.assertIn("product lines: 500 of ", done.stdout)
        self.assertIn("100 python/sglang/srt/utils/a.py:1 long", done.stdout)

    def test_a_file_past_the_limit(self):
        done = self.size("x = 1\n" * 501)
        self.assertEqual(done.returncode, 1)
        self.assertIn("error: python/sglang/srt/utils/a.py: 501 lines, the limit is 500", done.stdout)

    def test_a_function_past_the_limit(self):
        done = self.size(function(101), "test/registered/test_a.py")
        self.assertEqual(done.returncode, 1)
        self.assertIn("error: test/registered/test_a.py:1: long has 101 lines", done.stdout)
        self.assertIn("product lines: 0 of", done.stdout)

    def test_kernel_bodies_are_excepted(self):
        self.assertEqual(self.size(function(101, "@triton.jit\n")).returncode, 0)

    def test_a_package_past_its_budget(self):
        budget = runpy.run_path(str(SCRIPT))["BUDGETS"]["sglang/cli"]
        half = "x = 1\n" * (budget // 2)
        for more, status in ((budget % 2, 0), (budget % 2 + 1, 1)):
            done = self.size({"python/sglang/cli/a.py": half, "python/sglang/cli/b.py": half + "x = 1\n" * more})
            self.assertEqual(done.returncode, status, done.stdout)
            said = f"error: sglang/cli: {budget + 1:,} lines, its budget is {budget:,}"
            self.assertEqual(said in done.stdout, status == 1)

    def test_a_package_without_a_budget(self):
        done = self.size("x = 1\n", "python/sglang/srt/novelty/a.py")
        self.assertEqual(done.returncode, 1)
        self.assertIn("error: sglang/srt/novelty: no budget", done.stdout)
        self.assertEqual(self.size("x = 1\n", "python/sglang/test/novelty/a.py").returncode, 0, "tests have none")

    def test_an_empty_tree_is_an_error(self):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, str(SCRIPT), folder], capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)


if __name__ == "__main__":
    unittest.main()
