"""The wheel holds every file of the package but tests and fakes, and the licence; it serves without them."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def files_below(root: Path) -> set[str]:
    """Names relative to ``root`` of all files, compiled ones left out."""
    found = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)) for path in found}


class TestWheel(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        # A build writes next to its sources: it gets a copy.
        source = Path(folder, "source")
        package = source / "python" / "sglang"
        shutil.copytree(REPO / "python" / "sglang", package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPO / name, source)
        cls.expected = {f"sglang/{name}" for name in files_below(package) if not name.startswith("test/")}
        done = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            cls.content = {name: archive.read(name) for name in archive.namelist()}
            cls.installed = Path(folder, "installed")
            archive.extractall(cls.installed)

    def one(self, ending: str) -> str:
        (name,) = (name for name in self.content if name.endswith(ending))
        return self.content[name].decode()

    def test_holds_every_file_of_the_package_and_no_other(self) -> None:
        found = {name for name in self.content if ".dist-info/" not in name}
        self.assertGreater(len(found), 200)
        self.assertEqual(sorted(found ^ self.expected), [])

    def test_pip_replaces_libraries_that_are_too_old(self) -> None:
        """The last releases without what is read: a fast encoding, an error's name, a type of scales."""
        lines = [line for line in self.one(".dist-info/METADATA").splitlines() if line.startswith("Requires-Dist: ")]
        needed = {need.name: need.specifier for need in (Requirement(line.partition(": ")[2]) for line in lines)}
        for name, version in (("tokenizers", "0.19.1"), ("huggingface_hub", "0.24.7"), ("safetensors", "0.5.3")):
            self.assertNotIn(version, needed[name], name)

    def test_holds_no_tests_and_no_fakes(self) -> None:
        vendors = [path.name for path in (REPO / "python/sglang/test/fakes").iterdir() if path.is_dir()]
        self.assertIn("aiter", vendors)
        wrong = {"test", "tests", "fakes", "amd_gate", *vendors}
        self.assertEqual([name for name in self.content if wrong & set(Path(name).parts)], [])

    def test_its_commands_need_no_tests(self) -> None:
        for words, status, said in (
            (["sglang.launch_server", "--dry-run"], 0, "dry run: accepted"),
            (["sglang.kernels", "--amd-report"], 2, "error: --amd-report runs in a checkout"),
        ):
            environ = {**os.environ, "PYTHONPATH": str(self.installed), "SGLANG_PLATFORM": "cpu"}
            command = [sys.executable, "-m", *words]
            done = subprocess.run(command, cwd=self.installed, env=environ, capture_output=True, text=True)
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertIn(said, done.stdout + done.stderr)

    def test_holds_the_licence(self) -> None:
        text = (REPO / "LICENSE").read_text(encoding="utf-8")
        self.assertEqual(self.one(".dist-info/licenses/LICENSE"), text)
        for part in ("Apache License", "Version 2.0, January 2004", "9. Accepting Warranty", "APPENDIX: How to apply"):
            self.assertIn(part, text)
        self.assertIn("\nLicense-Expression: Apache-2.0\n", self.one(".dist-info/METADATA"))


if __name__ == "__main__":
    unittest.main()
