"""Ports, process trees and platform questions of sglang.srt.utils.common."""

import os
import socket
import subprocess
import sys
import time
import unittest

import psutil

from sglang.srt.platforms import override_platform, select_platform
from sglang.srt.utils.common import get_free_port, is_hip
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

SLEEPER = "import time; time.sleep(300)"
TREE = f"""import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}])
print(child.pid, flush=True)
child.wait()"""


class TestCommon(CustomTestCase):
    def test_a_free_port_can_be_taken(self):
        with socket.create_server(("127.0.0.1", get_free_port())):
            pass

    def start_tree(self) -> tuple[subprocess.Popen, int]:
        parent = subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, text=True)
        self.addCleanup(parent.stdout.close)
        self.addCleanup(parent.wait)
        self.addCleanup(parent.kill)
        return parent, int(parent.stdout.readline())

    def assert_gone(self, pid: int) -> None:
        deadline = time.monotonic() + 60
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            self.assertLess(time.monotonic(), deadline, f"process {pid} still runs")
            time.sleep(0.02)

    def test_kill_process_tree(self):
        parent, child = self.start_tree()
        kill_process_tree(parent.pid)
        self.assertIsNotNone(parent.poll())
        self.assert_gone(child)
        kill_process_tree(parent.pid)

    def test_kill_children_only(self):
        _, child = self.start_tree()
        kill_process_tree(os.getpid(), include_parent=False)
        self.assert_gone(child)

    def test_platform_questions(self):
        with override_platform(select_platform("cpu")):
            self.assertFalse(is_hip())


if __name__ == "__main__":
    unittest.main()
