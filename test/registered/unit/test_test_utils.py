"""popen_launch_server and CustomTestCase, against a stand-in server that starts in milliseconds."""

import importlib
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import (
    PROCESS_STATE,
    CustomTestCase,
    free_url,
    kill_process_tree,
    launch_timeout,
    popen_launch_server,
)

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

# Modes, taken from the last argument: die, hang, or answer 503 twice and then 200 to who brings the key.
STAND_IN = """
import http.server, os, sys, time
mode, port = sys.argv[-1], int(sys.argv[sys.argv.index("--port") + 1])
print("stand-in", mode, os.environ["PLANTED"], flush=True)
if mode == "die":
    sys.exit(3)
if mode == "hang":
    time.sleep(60)
calls = []

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        calls.append(self.path)
        wanted = self.path == "/health_generate" and self.headers["Authorization"] == "Bearer k"
        self.send_response(200 if wanted and len(calls) > 2 else 503)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class TestLaunchTimeout(CustomTestCase):
    def test_ci_waits_longer(self):
        for variables, seconds in (
            ({}, 120), ({"SGLANG_IS_IN_CI": "1"}, 600), ({"SGLANG_IS_IN_CI": "1", "SGLANG_IS_IN_CI_AMD": "1"}, 3600)
        ):  # fmt: skip
            with mock.patch.dict(os.environ, {"SGLANG_IS_IN_CI": "", "SGLANG_IS_IN_CI_AMD": "", **variables}):
                self.assertEqual(launch_timeout(), seconds, variables)


class TestLaunch(CustomTestCase):
    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        package = Path(folder) / "sglang"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "launch_server.py").write_text(STAND_IN)
        self.env = {"PYTHONPATH": folder, "PLANTED": "yes"}

    def launch(self, mode: str, timeout: float, **kwargs):
        return popen_launch_server("m", free_url(), timeout, other_args=[mode], env=self.env, **kwargs)

    def test_ready_after_refusals(self):
        process = self.launch("serve", 20, api_key="k")
        self.addCleanup(kill_process_tree, process.pid)
        self.assertIsNone(process.poll())
        self.assertIn("stand-in serve yes", process.log_path.read_text())
        kill_process_tree(process.pid)
        self.assertIsNotNone(process.wait(60))

    def test_early_exit_is_reported_at_once_with_the_output(self):
        with self.assertRaisesRegex(RuntimeError, r"(?s)exited with status 3.*stand-in die yes"):
            self.launch("die", 20)

    def test_a_server_that_never_answers_is_ended(self):
        with self.assertRaisesRegex(TimeoutError, r"(?s)not ready within 1 s.*stand-in hang"):
            self.launch("hang", 1)


class TestCustomTestCase(CustomTestCase):
    def test_tear_down_runs_after_a_failed_set_up(self):
        calls = []

        class Planted(CustomTestCase):
            @classmethod
            def setUpClass(cls):
                calls.append("up")
                raise OSError("no server")

            @classmethod
            def tearDownClass(cls):
                calls.append("down")

            def test_never(self):
                calls.append("test")

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Planted).run(result)
        self.assertEqual(calls, ["up", "down"])
        self.assertEqual(len(result.errors), 1)
        self.assertIn("no server", result.errors[0][1])

    def test_a_test_leaves_process_state_as_it_found_it(self):
        def values():
            owners = {name: importlib.import_module(name) for name in PROCESS_STATE}
            return {(name, field): getattr(owners[name], field) for name in owners for field in PROCESS_STATE[name]}

        class Planted(CustomTestCase):
            def test_changes(self):
                for name, field in values():
                    setattr(sys.modules[name], field, "changed")
                os.environ["SGLANG_PLANTED"] = "1"

        before = values()
        result = unittest.TestResult()
        Planted("test_changes").run(result)
        self.assertTrue(result.wasSuccessful(), result.errors)
        self.assertEqual(values(), before)
        self.assertNotIn("SGLANG_PLANTED", os.environ)


if __name__ == "__main__":
    unittest.main()
