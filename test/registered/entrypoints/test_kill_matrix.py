"""Every signal to every process at every stage: clients get a reply, and no process or file is left."""

import signal
import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kill_matrix import STAGES, Cell
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1500, suite="nightly-cpu", nightly=True)


class Matrix:
    process = ""

    def cells(self, signum):
        for stage in STAGES:
            with self.subTest(stage):
                print(Cell(self.process, signum, stage).run(), flush=True)

    def test_kill(self):
        self.cells(signal.SIGKILL)

    def test_stop(self):
        self.cells(signal.SIGSTOP)

    def test_term(self):
        self.cells(signal.SIGTERM)

    def test_int(self):
        self.cells(signal.SIGINT)

    def test_hup(self):
        self.cells(signal.SIGHUP)


class TestMain(Matrix, CustomTestCase):
    process = "main"


class TestScheduler(Matrix, CustomTestCase):
    process = "scheduler"


class TestDetokenizer(Matrix, CustomTestCase):
    process = "detokenizer"


if __name__ == "__main__":
    unittest.main()
