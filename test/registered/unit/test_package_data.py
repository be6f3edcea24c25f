"""Every file that the product reads beside its modules is in the distribution."""

import ast
import re
import subprocess
import unittest
from pathlib import Path, PurePosixPath

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
PACKAGE = REPO / "python" / "sglang"


def declared_patterns() -> list[str]:
    """``package-data`` of pyproject.toml, which Python 3.10 cannot read by itself."""
    table = re.search(r"package-data\]\nsglang = (\[.*?\n\])", (REPO / "pyproject.toml").read_text(), re.S)
    assert table is not None
    patterns: list[str] = ast.literal_eval(table[1])
    return patterns


class TestPackageData(CustomTestCase):
    def test_every_data_file_matches_a_pattern(self) -> None:
        packaged = {path for pattern in declared_patterns() for path in PACKAGE.glob(pattern) if path.is_file()}
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."],
            cwd=PACKAGE, capture_output=True, text=True,
        )  # fmt: skip
        if listed.returncode != 0:
            self.skipTest("not a git checkout")
        files = [PurePosixPath(line) for line in listed.stdout.splitlines()]
        data = [path for path in files if path.suffix != ".py" and (PACKAGE / path).is_file()]
        self.assertGreater(len(data), 10)
        self.assertEqual([str(path) for path in data if PACKAGE / path not in packaged], [])


if __name__ == "__main__":
    unittest.main()
