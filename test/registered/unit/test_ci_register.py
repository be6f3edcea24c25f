"""Registration lines are read with ast, and every way of writing one wrongly is an error that names the file."""

import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import (
    AMD_SUITES,
    CIRegistration,
    auto_partition,
    collect_tests,
    parse_registrations,
    register_cpu_ci,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

MAIN = '\nif __name__ == "__main__":\n    unittest.main()\n'


class TestParse(CustomTestCase):
    def setUp(self):
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "test_planted.py"

    def parse(self, text: str) -> list[CIRegistration]:
        self.path.write_text(text)
        return parse_registrations(self.path, "test_planted.py")

    def test_reads_several_backends_and_both_spellings(self):
        found = self.parse(
            'register_cpu_ci(5, "stage-a-test-cpu")\n'
            'register_amd_ci(est_time=60, stage="stage-b", runner_config="1-gpu-small-amd", disabled="why")\n'
            'ci_register.register_amd_ci(est_time=9.5, suite="nightly-amd", nightly=True)\n'
        )
        self.assertEqual(
            found,
            [
                CIRegistration("cpu", "test_planted.py", 5.0, "stage-a-test-cpu"),
                CIRegistration("amd", "test_planted.py", 60.0, "stage-b-test-1-gpu-small-amd", False, "why"),
                CIRegistration("amd", "test_planted.py", 9.5, "nightly-amd", True),
            ],
        )

    def test_does_not_run_the_file(self):
        marker = self.path.with_suffix(".ran")
        self.parse(f'open({str(marker)!r}, "w")\nregister_cpu_ci(1, "stage-a-test-cpu")\n')
        self.assertFalse(marker.exists())

    def test_each_mistake_is_an_error_naming_the_file(self):
        suite = 'suite="stage-a-test-cpu"'
        for text, expected in (
            (f"register_cpu_ci(est_time=SECONDS, {suite})", "est_time must be a literal"),
            (f"register_cpu_ci(est_time=-5, {suite})", "est_time must be a literal"),
            (f"register_cpu_ci(est_time=0, {suite})", "positive"),
            (f'register_cpu_ci(est_time="5", {suite})', "est_time must be int or float"),
            (f"register_cpu_ci(est_time=True, {suite})", "est_time must be int or float"),
            (f"register_cpu_ci(est_time=5, {suite}, nightly=1)", "nightly must be bool"),
            ("register_cpu_ci(est_time=5, suite=None)", "suite must be str"),
            (f"register_cpu_ci({suite})", "est_time (seconds) is required"),
            ("register_cpu_ci(est_time=5)", "either suite="),
            ('register_cpu_ci(est_time=5, stage="stage-a")', "either suite="),
            (f'register_cpu_ci(est_time=5, {suite}, stage="stage-a")', "either suite="),
            (f'register_cpu_ci(est_time=5, {suite}, stage="stage-a", runner_config="cpu")', "either suite="),
            (f"register_cpu_ci(5, est_time=5, {suite})", "given twice"),
            (f"register_cpu_ci(est_time=5, {suite}, timeout=3)", "unknown argument 'timeout'"),
            ('register_cpu_ci(5, "stage-a-test-cpu", False, None, "stage-a")', "at most 4 positional"),
            (f"register_cpu_ci(est_time=5, {suite}, **more)", "cannot be read"),
            ("register_cpu_ci(*both)", "cannot be read"),
            (f"def f():\n    register_cpu_ci(est_time=5, {suite})", "bare statement"),
            (f"x = register_cpu_ci(est_time=5, {suite})", "bare statement"),
            (f"register_cpu_ci(est_time=5, {suite})\nregister_cpu_ci(est_time=6, {suite})", "twice"),
            ('register_adm_ci(est_time=5, suite="nightly-amd")', "register_adm_ci is unknown"),
            ("register_cpu_ci(", "not valid Python"),
        ):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    self.parse(text + "\n")
                self.assertIn(expected, str(caught.exception))
                self.assertIn("test_planted.py:", str(caught.exception))

    def test_suite_names_are_validated_for_every_hardware(self):
        for backend in ("cpu", "cuda", "amd"):
            for extra in ("", ", nightly=True"):
                with self.subTest(backend + extra), self.assertRaisesRegex(ValueError, "unknown .*suite"):
                    self.parse(f'register_{backend}_ci(est_time=5, suite="stage-b-test-small-1-gpu-amd"{extra})\n')
        with self.assertRaisesRegex(ValueError, "unknown suite 'nightly-amd'"):
            self.parse('register_amd_ci(est_time=5, suite="nightly-amd")\n')
        for suite in AMD_SUITES:
            self.assertEqual(self.parse(f'register_amd_ci(est_time=5, suite="{suite}")\n')[0].suite, suite)


class TestCollect(CustomTestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def plant(self, name: str, text: str) -> Path:
        (self.root / name).write_text(text)
        return self.root / name

    def test_names_are_relative_and_package_files_pass_by(self):
        files = [
            self.plant("test_b.py", 'register_cpu_ci(5, "stage-a-test-cpu")' + MAIN),
            self.plant("__init__.py", ""),
            self.plant("conftest.py", ""),
        ]
        self.assertEqual([r.filename for r in collect_tests(files, self.root)], ["test_b.py"])

    def test_a_file_must_register(self):
        with self.assertRaisesRegex(ValueError, r"test_a\.py: no CI registration"):
            collect_tests([self.plant("test_a.py", MAIN)])

    def test_a_file_must_run_its_tests(self):
        register = 'register_cpu_ci(5, "stage-a-test-cpu")\n'
        for ending in ("", 'if __name__ == "__main__":\n    pass\n', "if name == main:\n    unittest.main()\n"):
            with self.subTest(ending), self.assertRaisesRegex(ValueError, r"test_a\.py: no test would run"):
                collect_tests([self.plant("test_a.py", register + ending)])


class TestPartition(CustomTestCase):
    def test_longest_first_to_the_lightest_bin(self):
        files = [CIRegistration("cpu", f"test_{n}.py", n, "stage-a-test-cpu") for n in (1, 2, 3, 4, 10)]
        parts = [auto_partition(files, rank, 2) for rank in range(2)]
        self.assertEqual([[r.est_time for r in part] for part in parts], [[10], [4, 3, 2, 1]])

    def test_every_file_in_exactly_one_part_whatever_the_order(self):
        files = [CIRegistration("cpu", f"test_{n}.py", 7, "stage-a-test-cpu") for n in range(11)]
        parts = [auto_partition(files, rank, 3) for rank in range(3)]
        self.assertEqual(sorted(r.filename for part in parts for r in part), sorted(r.filename for r in files))
        self.assertEqual(parts, [auto_partition(files[::-1], rank, 3) for rank in range(3)])
        self.assertEqual([len(part) for part in parts], [4, 4, 3])

    def test_bad_partition(self):
        for rank, size in ((2, 2), (-1, 2), (0, 0)):
            with self.subTest(rank=rank, size=size), self.assertRaises(ValueError):
                auto_partition([], rank, size)


if __name__ == "__main__":
    unittest.main()
