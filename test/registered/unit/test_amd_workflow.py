"""The AMD workflow starts suites that exist, all that have tests, in whole partitions, by scripts that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import unittest
from collections import defaultdict
from pathlib import Path
from unittest import mock

import yaml

from sglang.test.ci.ci_register import CIRegistration, collect_tests, register_cpu_ci, valid_suites
from sglang.test.test_utils import CustomTestCase
from sglang.test.vendors import real_vendor

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
ROOT = REPO / "test" / "registered"
START = "amd_ci_start_container.sh"
WORKFLOW = REPO / ".github" / "workflows" / "pr-test-amd.yml"


def amd_registrations() -> list[CIRegistration]:
    return [r for r in collect_tests(ROOT.rglob("*.py"), ROOT) if r.backend == "amd" and not r.nightly]


class TestWorkflow(CustomTestCase):
    def setUp(self) -> None:
        self.job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["suites"]
        self.rows = self.job["strategy"]["matrix"]["include"]

    def test_suites_exist(self) -> None:
        suites = {row["suite"] for row in self.rows}
        self.assertLessEqual(suites, set(valid_suites("amd", nightly=False)))
        self.assertLessEqual({"stage-b-test-1-gpu-small-amd", "stage-b-test-2-gpu-large-amd"}, suites)
        self.assertLessEqual({r.suite for r in amd_registrations()}, suites, "a registered test that no job runs")

    def test_both_architectures_run_the_same_files(self) -> None:
        """gfx942 and gfx950 have jobs of their own; two ranks of MORI run on the machines that have two GPUs."""
        files = defaultdict(set)
        for registration in amd_registrations():
            files[registration.suite].add(registration.filename)
        for gfx942, gfx950 in (
            ("stage-b-test-1-gpu-small-amd", "stage-b-test-1-gpu-small-amd-mi35x"),
            ("stage-b-test-2-gpu-large-amd", "stage-c-test-large-8-gpu-amd-mi35x"),
        ):
            self.assertEqual(files.pop(gfx942), files.pop(gfx950), gfx950)
        self.assertEqual(files, {}, "a suite of one architecture alone")
        for row in self.rows:
            family = "mi35x" if row["suite"].endswith("mi35x") else "mi325"
            self.assertIn(family, row["label"])

    def test_a_vendor_that_does_not_import_is_never_a_skip(self) -> None:
        """On AMD's machines AITER and MORI must be there: their absence fails the test, and so does a fake."""
        helpers = sorted((REPO / "python" / "sglang" / "test").glob("*.py"))
        for path in [*helpers, *(ROOT / registration.filename for registration in amd_registrations())]:
            text = path.read_text(encoding="utf-8")
            for word in ("SkipTest", "self.skipTest"):
                self.assertNotIn(word, text, f"{path} skips while it runs")
        fakes = REPO / "python" / "sglang" / "test" / "fakes"
        self.assertRaises(ModuleNotFoundError, real_vendor, "aiter")
        with mock.patch.object(sys, "path", [str(fakes), *sys.path]):
            self.assertRaisesRegex(AssertionError, "is the project's fake", real_vendor, "aiter")

    def test_partitions_are_whole(self) -> None:
        partitions = defaultdict(list)
        for row in self.rows:
            partitions[row["suite"], row["partitions"]].append(row["partition"])
        self.assertEqual(len(partitions), len({suite for suite, _ in partitions}), "a suite is cut in two ways")
        for (suite, count), found in partitions.items():
            self.assertEqual(sorted(found), list(range(count)), suite)

    def test_scripts_parse(self) -> None:
        steps = "\n".join(step.get("run", "") for step in self.job["steps"])
        scripts = set(re.findall(r"scripts/\S+\.sh", steps))
        self.assertGreaterEqual(len(scripts), 4)
        for name in scripts:
            self.assertTrue(os.access(REPO / name, os.X_OK), f"{name} is not executable")
            subprocess.run(["bash", "-n", str(REPO / name)], check=True)


def run_script(name: str, *arguments: str, arch: str = "gfx942") -> subprocess.CompletedProcess[str]:
    """A script of ``scripts/ci/amd``, with a docker that prints what it is asked and a long-winded rocminfo."""
    with tempfile.TemporaryDirectory() as folder:
        rocminfo = f"yes '  Name: {arch}' | head -n 30000\n"
        for command, body in (("docker", 'printf "%s\\n" "$@"\n'), ("rocminfo", rocminfo)):
            path = Path(folder, command)
            path.write_text(f"#!/bin/sh\n{body}")
            path.chmod(0o755)
        env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        script = REPO / "scripts" / "ci" / "amd" / name
        return subprocess.run([str(script), *arguments], env=env, capture_output=True, text=True)


class TestStartContainer(CustomTestCase):
    def test_the_image_is_that_of_the_gpu(self) -> None:
        for arch, image in (("gfx942", "rocm720-mi30x"), ("gfx950", "rocm720-mi35x")):
            self.assertIn(f"image: lmsysorg/sglang:v0.5.12-{image}\n", run_script(START, arch=arch).stdout)
        self.assertIn("no image is known for gfx1100", run_script(START, arch="gfx1100").stderr)
        self.assertIn("image: mine\n", run_script(START, "--image", "mine", arch="gfx1100").stdout)


class TestExec(CustomTestCase):
    def test_environment_and_command(self) -> None:
        arguments = ["-w", "/sglang-checkout/test", "-e", "A=b c", "python3", "run_suite.py", "--hw", "amd"]
        asked = run_script("amd_ci_exec.sh", *arguments).stdout.splitlines()
        self.assertEqual(asked[:3], ["exec", "-w", "/sglang-checkout/test"])
        for variable in ("SGLANG_IS_IN_CI=1", "SGLANG_IS_IN_CI_AMD=1", "SGLANG_USE_AITER=1", "A=b c"):
            self.assertIn(variable, asked)
        self.assertEqual(asked[-5:], ["ci_sglang", "python3", "run_suite.py", "--hw", "amd"])

    def test_without_a_command(self) -> None:
        self.assertEqual(run_script("amd_ci_exec.sh", "-w", "/").returncode, 2)


if __name__ == "__main__":
    unittest.main()
