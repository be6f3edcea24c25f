"""Keys from files and variables: which one holds, what is refused, and that no key is ever shown."""

import os
import tempfile
import unittest
from dataclasses import asdict

from sglang.srt.arg_groups.keys import find_keys
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestKeys(CustomTestCase):
    def file(self, data, mode=0o600):
        handle, path = tempfile.mkstemp()
        self.addCleanup(os.unlink, path)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(path, mode)
        return path

    def test_which_source_holds(self):
        path = self.file("из файла\n".encode())
        both = {"SGLANG_API_KEY": "var", "SGLANG_ADMIN_API_KEY": "admin-var"}
        for fields, environ, expected in (
            ({}, {}, (None, None)),
            ({}, both, ("var", "admin-var")),
            ({"api_key_file": path}, both, ("из файла", "admin-var")),
            ({"api_key": "flag", "admin_api_key_file": path}, both, ("flag", "из файла")),
            ({}, {"SGLANG_API_KEY": " "}, (None, None)),
        ):
            keys = find_keys(ServerArgs(**fields), environ)
            found = {**fields, **keys.values}
            self.assertEqual(((found["api_key"], found["admin_api_key"]), keys.errors), (expected, []))
            self.assertEqual(keys.warnings, [])

    def test_what_is_refused_or_warned_of(self):
        for data, pattern in (
            (b"", "empty"), (b" \n", "empty"), (b"a\nb\n", "more than one line"), (b"\xff", "not UTF-8"),
            (b"k" * 5000, "not a key"), (b"a\x1bb", "control"),
        ):  # fmt: skip
            path = self.file(data)
            keys = find_keys(ServerArgs(api_key_file=path), {})
            self.assertRegex(keys.errors[0], f"--api-key-file {path}.*{pattern}")
            self.assertNotIn("api_key", keys.values)
        self.assertIn("No such file", find_keys(ServerArgs(admin_api_key_file="/no/such"), {}).errors[0])
        path = self.file(b"k")
        self.assertIn("remove one", find_keys(ServerArgs(api_key="k", api_key_file=path), {}).errors[0])
        keys = find_keys(ServerArgs(api_key_file=self.file(b"k", 0o644)), {})
        self.assertIn("chmod 600", keys.warnings[0])

    def test_no_key_is_shown(self):
        path = self.file(b"secret-file")
        environ = {"SGLANG_ADMIN_API_KEY": "secret-var"}
        plan = evaluate(ServerArgs(api_key_file=path, host="0.0.0.0"), None, environ)
        self.assertEqual((plan.args.api_key, plan.args.admin_api_key), ("secret-file", "secret-var"))
        self.assertNotIn("secret-", "\n".join(plan.lines()))
        self.assertEqual(plan.variables, {"SGLANG_ADMIN_API_KEY": "<redacted>"})
        self.assertEqual(asdict(plan.args)["api_key_file"], path)
        self.assertFalse([text for text in plan.warnings if "without --api-key" in text])

    def test_an_admin_key_alone_leaves_inference_open_and_says_so(self):
        for host in ("127.0.0.1", "0.0.0.0"):
            plan = evaluate(ServerArgs(admin_api_key="a", host=host), None, {})
            self.assertIn("--api-key", "\n".join(plan.warnings))


if __name__ == "__main__":
    unittest.main()
