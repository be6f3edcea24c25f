"""scripts/lib.sh prints what it does from the start, and what to set if torch's CPU build cannot be downloaded."""

import os
import pty
import subprocess
import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

LIB = Path(__file__).resolve().parents[3] / "scripts" / "lib.sh"
# Stands for every Python: it makes environments, holds no torch, and notes what pip is asked for.
STAND_IN = """#!/bin/sh
case "$*" in
"-m venv "*) echo "venv" >>"$CALLS" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-m pip install "*) echo "$*" >>"$CALLS"; case "$*" in *--no-index*) exit "$NO_WHEELS" ;; esac ;;
"- torch"*) exit 1 ;;
"- http"*) exit "$NO_ANSWER" ;;
esac
"""


class TestInstall(CustomTestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.folder / "python").write_text(STAND_IN)
        (self.folder / "python").chmod(0o755)
        self.calls = self.folder / "calls"

    def install(
        self, terminal: bool = False, no_wheels: int = 1, no_answer: int = 0, extras: str = "test"
    ) -> tuple[int, list[str]]:
        """Exit status and output of ``ensure_venv`` without a GPU, seen by a terminal or by a log."""
        code = f"set -euo pipefail; source {LIB}; VENV={self.folder}/venv; gpu_kind() {{ echo none; }}; "
        code += f"ensure_venv {extras}"
        kept = {name: value for name, value in os.environ.items() if name != "SGLANG_TORCH_INDEX_URL"}
        env = {**kept, "PYTHON": f"{self.folder}/python", "CALLS": str(self.calls)}
        env |= {"NO_WHEELS": str(no_wheels), "NO_ANSWER": str(no_answer)}
        ours, theirs = pty.openpty() if terminal else os.pipe()
        with open(ours, "rb", buffering=0) as reader:
            done = subprocess.run(["bash", "-c", code], env=env, stdout=theirs, stderr=subprocess.STDOUT, timeout=60)
            os.close(theirs)
            output = b""
            try:
                while block := reader.read(65536):
                    output += block
            except OSError:  # a terminal whose other side is closed
                pass
        return done.returncode, output.decode().splitlines()

    def test_phases_and_progress(self) -> None:
        for terminal in (False, True):
            with self.subTest(terminal=terminal):
                self.calls.write_text("")
                status, lines = self.install(terminal)
                self.assertEqual(status, 0, lines)
                self.assertIn(f"installing into {self.folder}/venv, once; SGLANG_TORCH_INDEX_URL can name", lines[0])
                for line, part in zip(lines[1:], ("making the env", "torch's CPU build", "[test]", "installed, ")):
                    self.assertIn(part, line)
                venv, wheels, torch, package = self.calls.read_text().splitlines()
                self.assertEqual(venv, "venv")
                self.assertIn("--dry-run --no-index", wheels)
                for call in (torch, package):
                    self.assertEqual("--quiet" in call, not terminal, "pip shows its progress on a terminal")
                self.assertEqual(self.install(terminal), (0, []))
                (self.folder / "venv" / "bin" / "python").unlink()

    def test_what_was_installed_covers_less_and_not_more(self) -> None:
        installed = []
        for extras in ("", "test", "", "test,clients", "test", "test,clients", ""):
            self.calls.write_text("")
            self.assertEqual(self.install(extras=extras)[0], 0)
            installed += [line.split()[-1].rpartition("/")[2] for line in self.calls.read_text().splitlines()[-1:]]
        name = LIB.parents[1].name
        self.assertEqual(installed, [name, f"{name}[test]", f"{name}[test,clients]"])

    def test_local_wheels_come_first(self) -> None:
        _, lines = self.install(no_wheels=0)
        self.assertIn("the local wheels that pip is set up with", lines[2])
        self.assertNotIn("--index-url", self.calls.read_text())

    def test_only_a_general_index_in_reach(self) -> None:
        """Without waiting for pip's retries: what to set."""
        status, lines = self.install(no_answer=1)
        self.assertEqual(status, 1)
        self.assertIn("set SGLANG_TORCH_INDEX_URL to an index that has it, or to https://pypi.org/simple", lines[-1])
        self.assertNotIn("--index-url", self.calls.read_text())


if __name__ == "__main__":
    unittest.main()
