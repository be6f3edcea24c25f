"""test/run_suite.py counts cases correctly, for files that pass, fail, skip, crash, hang, or run nothing."""

import json
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

SCRIPT = Path(__file__).resolve().parents[3] / "test" / "run_suite.py"

TEMPLATE = """
import os, signal, sys, unittest

def register_cpu_ci(*args, **kwargs): pass
register_amd_ci = register_cpu_ci

{registration}

class TestPlanted(unittest.TestCase):
{body}

if __name__ == "__main__":
    {main}
"""
REGISTRATION = 'register_cpu_ci(est_time=2, suite="stage-a-test-cpu")'
PASSING = "def test_one(self): pass\ndef test_two(self): pass"


class TestRunSuite(CustomTestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def plant(self, name: str, body: str, registration: str = REGISTRATION, main: str = "unittest.main()"):
        text = TEMPLATE.format(registration=registration, body=textwrap.indent(body, "    "), main=main)
        (self.root / f"test_{name}.py").write_text(text)

    def run_suite(self, *args: str, suite: str = "stage-a-test-cpu", hw: str = "cpu") -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), "--hw", hw, "--suite", suite, "--root", str(self.root), *args]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)

    def assert_closing(self, done: subprocess.CompletedProcess, closing: str, status: int):
        self.assertEqual(
            (done.stdout.splitlines()[-1:], done.returncode), ([closing], status), done.stdout + done.stderr
        )

    def test_counts_over_all_kinds_of_files(self):
        self.check_counts()

    def test_counts_are_the_same_with_imports_done_before(self):
        self.plant("h_forked", "def test_imported(self): self.assertIn('tabnanny', sys.modules)")
        self.check_counts("--preload", "tabnanny", passed=6)

    def check_counts(self, *flags: str, passed: int = 5):
        self.plant("a_pass", PASSING)
        self.plant(
            "b_mixed",
            'def test_bad(self): self.assertEqual(1, 2)\ndef test_error(self): raise KeyError("k")\n'
            'def test_ok(self): pass\ndef test_skip(self): self.skipTest("no such device")',
        )
        self.plant("c_crash", "def test_dies(self): os.kill(os.getpid(), signal.SIGSEGV)")
        self.plant("d_exit", PASSING, main="unittest.main(exit=False); sys.exit(7)")
        self.plant("e_empty", "pass")
        self.plant("f_silent_exit", "def test_exit(self): os._exit(0)")
        self.plant("g_setup", f"@classmethod\ndef setUpClass(cls): raise OSError('x')\n{PASSING}")
        timings = self.root / "timings.jsonl"
        done = self.run_suite("--continue-on-error", "--timings-file", str(timings), *flags)
        # a: 2 passed; b: 1 passed, 2 failed, 1 skipped; d: 2 passed, 1 failed; c, e, f, g: 1 failed each.
        self.assert_closing(done, f"{passed} passed, 7 failed, 1 skipped", 1)
        self.assertIn("c_crash.py: FAILED (no unittest summary (killed by signal 11))", done.stdout)
        self.assertIn("d_exit.py: FAILED (exit status 7 after its tests: OK)", done.stdout)
        self.assertIn("e_empty.py: FAILED (", done.stdout)
        self.assertIn("f_silent_exit.py: FAILED (no unittest summary (exit status 0))", done.stdout)
        self.assertIn("AssertionError: 1 != 2", done.stdout)
        self.assertIn("skipped in test_b_mixed.py: no such device", done.stdout)
        rows = [json.loads(line) for line in timings.read_text().splitlines()]
        self.assertEqual([row["failed"] for row in rows][:7], [0, 2, 1, 1, 1, 1, 1])
        self.assertGreater(rows[0]["seconds"], 0)
        self.assertIn(f"registered cpu {len(rows)}, executed on cpu {len(rows)}", done.stdout)

    def test_all_passing(self):
        self.plant("a", PASSING)
        self.plant("other_suite", PASSING, 'register_cpu_ci(est_time=2, suite="stage-b-test-cpu")')
        done = self.run_suite()
        self.assert_closing(done, "2 passed, 0 failed, 0 skipped", 0)
        self.assertNotIn("{", done.stdout, "timings go to a file")
        self.assertIn("registered cpu 2, executed on cpu 1", done.stdout)
        done = self.run_suite("--suite", "stage-b-test-cpu")
        self.assert_closing(done, "4 passed, 0 failed, 0 skipped", 0)

    def test_stops_at_the_first_failing_file(self):
        self.plant("a", "def test_bad(self): self.fail()")
        self.plant("b", PASSING)
        done = self.run_suite()
        self.assert_closing(done, "0 passed, 1 failed, 0 skipped", 1)
        self.assertIn("1 not run", done.stdout)

    def test_a_summary_printed_by_a_test_does_not_count(self):
        self.plant("a", 'def test_prints(self):\n    print("Ran 99 tests in 1s\\n\\nOK", flush=True)\n    self.fail()')
        self.assert_closing(self.run_suite(), "0 passed, 1 failed, 0 skipped", 1)

    def test_time_out_ends_the_file_and_what_it_started(self):
        alive = self.root / "alive"
        loop = f"import time\nwhile True:\n    open({str(alive)!r}, 'w').close()\n    time.sleep(0.05)"
        self.plant(
            "a", f"def test_hangs(self):\n    import subprocess\n    subprocess.run([sys.executable, '-c', {loop!r}])"
        )
        done = self.run_suite("--timeout-per-file", "5")
        self.assert_closing(done, "0 passed, 1 failed, 0 skipped", 1)
        self.assertIn("timed out after 5 s", done.stdout)
        self.assertTrue(alive.exists())
        alive.unlink()
        time.sleep(0.5)
        self.assertFalse(alive.exists(), "a process that the file started still runs")

    def test_a_skipped_suite_is_not_a_pass(self):
        amd = 'register_amd_ci(est_time=60, suite="stage-b-test-1-gpu-small-amd")'
        self.plant("a_amd", 'def test_a(self): self.skipTest("needs an AMD GPU")', amd)
        self.plant("b_cpu", PASSING)
        done = self.run_suite(suite="stage-b-test-1-gpu-small-amd", hw="amd")
        self.assert_closing(done, "0 passed, 0 failed, 1 skipped", 1)
        self.assertIn("registered amd 1, executed on hip 0", done.stdout)
        self.assertIn("that is not a pass", done.stdout)
        self.assertIn("registered amd 1, executed on hip 0", self.run_suite().stdout)

    def test_a_file_skipped_whole_fails_the_run_whatever_else_ran(self):
        self.plant("a", '@classmethod\ndef setUpClass(cls): raise unittest.SkipTest("why")\n' + PASSING)
        self.plant("b", PASSING)
        done = self.run_suite()
        self.assert_closing(done, "2 passed, 0 failed, 1 skipped", 1)
        self.assertIn("error: 1 file ran no test on cpu, all were skipped; that is not a pass", done.stdout)
        self.assertIn("SKIPPED (not a pass):\n  test_a.py", done.stdout)

    def test_a_file_counts_once_however_many_suites_it_is_in(self):
        amd = "".join(f'register_amd_ci(est_time=6, suite="stage-b-test-1-gpu-small-amd{s}")\n' for s in ("", "-mi35x"))
        self.plant("a", PASSING, amd)
        self.plant("b", PASSING)
        self.assertIn("registered amd 1, executed on hip 0", self.run_suite().stdout)

    def test_listed_suite_without_registrations_says_so(self):
        self.plant("a", PASSING)
        done = self.run_suite(suite="stage-b-test-cpu")
        self.assert_closing(done, "0 passed, 0 failed, 0 skipped", 0)
        self.assertIn("No tests found for hw=cpu suite=stage-b-test-cpu", done.stdout)

    def test_disabled_files_are_listed_and_not_run(self):
        self.plant("a", PASSING, 'register_cpu_ci(est_time=2, suite="stage-a-test-cpu", disabled="flaky clock")')
        self.plant("b", PASSING)
        done = self.run_suite()
        self.assert_closing(done, "2 passed, 0 failed, 0 skipped", 0)
        self.assertIn("disabled: test_a.py: flaky clock", done.stdout)

    def test_a_bad_registration_stops_the_run(self):
        self.plant("a", PASSING, 'register_cpu_ci(est_time=2, suite="stage-z-test-cpu")')
        done = self.run_suite()
        self.assert_closing(done, "0 passed, 1 failed, 0 skipped", 1)
        self.assertIn("unknown suite 'stage-z-test-cpu'", done.stdout)

    def test_two_files_at_once_have_temporary_folders_of_their_own(self):
        """Each file waits until the other has begun, and finds its temporary folder empty."""
        for name, other in (("a", "b"), ("b", "a")):
            mine, theirs = (str(self.root / f"begun_{one}") for one in (name, other))
            self.plant(
                name,
                "def test_meet(self):\n    import tempfile, time\n"
                f"    open({mine!r}, 'w').close()\n    tempfile.mkstemp()\n"
                f"    until = time.monotonic() + 50\n    while not os.path.exists({theirs!r}):\n"
                "        self.assertLess(time.monotonic(), until)\n        time.sleep(0.05)\n"
                "    self.assertEqual(len(os.listdir(tempfile.gettempdir())), 1)",
            )
        done = self.run_suite("--jobs", "2", "--continue-on-error")
        self.assert_closing(done, "2 passed, 0 failed, 0 skipped", 0)

    def test_bad_arguments(self):
        for suite, args, expected in (
            ("stage-a-test-cpus", [], "unknown suite 'stage-a-test-cpus'"),
            ("stage-a-test-cpu", ["--auto-partition-id", "0"], "come together"),
            ("stage-a-test-cpu", ["--auto-partition-id", "2", "--auto-partition-size", "2"], "is not in [0, 2)"),
            ("stage-a-test-cpu", ["--max-attempts", "0"], "at least 1"),
            ("stage-a-test-cpu", ["--jobs", "0"], "--jobs must be at least 1"),
        ):
            with self.subTest(suite=suite, args=args):
                done = self.run_suite(*args, suite=suite)
                self.assertEqual(done.returncode, 2)
                self.assertIn(expected, done.stderr)

    def test_retry_mends_an_assertion_but_not_a_code_error(self):
        marker = self.root / "ran_once"
        once = f"if os.path.exists({str(marker)!r}): return\nopen({str(marker)!r}, 'w').close()\n"
        retry = ("--enable-retry", "--retry-wait-seconds", "0")
        for raised, closing, status in (
            ("self.fail()", "1 passed, 0 failed, 0 skipped", 0),
            ("raise TypeError('x')", "0 passed, 1 failed, 0 skipped", 1),
        ):
            with self.subTest(raised):
                marker.unlink(missing_ok=True)
                self.plant("a", "def test_a(self):\n" + textwrap.indent(once + raised, "    "))
                done = self.run_suite(*retry)
                self.assert_closing(done, closing, status)
                self.assertEqual("RETRIED: 0 files" in done.stdout, status == 1)

    def test_partitions_follow_measured_timings(self):
        for name in "abc":
            self.plant(name, PASSING)
        timings = self.root / "timings.jsonl"
        timings.write_text(
            "\n".join(json.dumps({"file": f"test_{n}.py", "seconds": s}) for n, s in (("c", 50), ("a", 1)))
        )
        part = ("--auto-partition-size", "2", "--partition-model-file", str(timings), "--auto-partition-id")
        self.assertIn("Begin (1/1) test_c.py", self.run_suite(*part, "0").stdout)
        done = self.run_suite(*part, "1")
        self.assertIn("Begin (2/2) test_b.py", done.stdout)
        self.assert_closing(done, "4 passed, 0 failed, 0 skipped", 0)


if __name__ == "__main__":
    unittest.main()
