"""Hostile grammars end only the process that compiles them, and another process compiles the next one."""

import json
import signal
import tempfile
import time
import unittest
from contextlib import contextmanager
from unittest import mock

from sglang.srt.constrained.grammar_checker import CheckerError, GrammarChecker
from sglang.srt.constrained.llguidance_backend import GrammarError
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=9, suite="stage-a-test-cpu")

ENDLESS = json.dumps({"type": "integer", "multipleOf": 99_999_999})


class TestChecker(CustomTestCase):
    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        tokenizer = Tokenizer.from_path(write_tokenizer(folder, byte_level_tokenizer()))
        self.checker = GrammarChecker(tokenizer.to_json, tokenizer.vocab_size, {"whitespace_flexible": False})
        self.addCleanup(self.checker.close)

    def refusal(self, kind, source):
        with self.assertRaises(GrammarError) as caught:
            self.checker.check(kind, source)
        return str(caught.exception)

    def test_good_bad_and_endless(self):
        self.assertIn('"whitespace_flexible":false', self.checker.check("json_schema", "{}").replace(" ", ""))
        self.assertIn("objekt", self.refusal("json_schema", '{"type": "objekt"}'))
        first = self.checker._process
        began = time.monotonic()
        self.assertIn("more than 2 s", self.refusal("json_schema", ENDLESS))
        self.assertLess(time.monotonic() - began, 50)
        self.assertEqual(first.returncode, -signal.SIGPROF)
        self.assertIn("abc", self.checker.check("regex", "abc"))
        second = self.checker._process
        self.assertNotEqual(second.pid, first.pid)
        # What a check takes is counted from its beginning.
        for _ in range(30):
            self.checker.check("json_schema", json.dumps({"enum": [f"x{i}" for i in range(2000)]}))
        self.assertIs(self.checker._process, second)
        self.checker.close()
        self.assertEqual(second.returncode, 0)
        for pipe in (second.stdin, second.stdout):
            self.assertTrue(pipe.closed)

    def test_too_much_memory(self):
        self.checker.check("regex", "a")
        process = self.checker._process
        with open(f"/proc/{process.pid}/limits") as limits:
            line = next(line for line in limits if line.startswith("Max address space"))
        self.assertLess(int(line.split()[3]), 4 << 30)
        # As Rust ends where it gets no memory.
        with self.ends(signal.SIGABRT):
            self.assertIn("MiB", self.refusal("regex", "b"))
        self.assertIn("a", self.checker.check("regex", "a"))

    @contextmanager
    def ends(self, number):
        """A signal ends the process while it compiles."""
        process, ask = self.checker._process, self.checker._ask

        def asked(*args):
            process.send_signal(number)
            process.wait()
            return ask(*args)

        with mock.patch.object(self.checker, "_ask", asked):
            yield

    def test_what_ends_it_from_outside_is_no_fault_of_a_grammar(self):
        self.checker.check("regex", "a")
        self.checker._process.kill()
        self.checker._process.wait()
        self.assertIn("b", self.checker.check("regex", "b"))  # by another process
        with self.ends(signal.SIGKILL), self.assertRaisesRegex(CheckerError, "short of memory"):
            self.checker.check("regex", "b")
        self.checker.check("regex", "b")
        with self.ends(signal.SIGSEGV):
            self.assertIn("ended the process", self.refusal("regex", "b"))
        with mock.patch("subprocess.Popen", side_effect=OSError("no memory")):
            with self.assertRaisesRegex(CheckerError, "did not start: no memory"):
                self.checker.check("regex", "a")
        self.checker._tokenizer_json = lambda: "{}"
        with mock.patch("sys.stderr"), self.assertRaisesRegex(CheckerError, "did not start"):
            self.checker.check("regex", "a")

    def test_it_ends_with_its_parent(self):
        self.checker.check("regex", "a")
        process = self.checker._process
        process.send_signal(signal.SIGINT)  # Ctrl-C reaches the whole group
        self.checker.check("regex", "b")
        process.stdin.close()
        self.assertEqual(process.wait(30), 0)


if __name__ == "__main__":
    unittest.main()
