"""Which of several failed processes the launcher names."""

import json
import os
import subprocess
import threading
import time
import unittest
from unittest import mock

from sglang.srt.managers import process_launch
from sglang.srt.managers.process_launch import ChildProcess, EngineProcesses, LaunchError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestCheckAlive(CustomTestCase):
    def setUp(self):
        self.engine = EngineProcesses(ipc=mock.Mock(), processes=[])
        self.reports = []
        for name in ("first", "second"):
            read, write = os.pipe()
            self.addCleanup(os.close, read)
            self.addCleanup(os.close, write)
            child = subprocess.Popen(["sleep", "60"])
            self.addCleanup(child.wait)
            self.addCleanup(child.kill)
            self.engine.processes.append(ChildProcess(name, child, read, -1))
            self.reports.append(write)

    def report(self, child, message, lost_peer, ago=0.0):
        words = {"message": message, "user_error": False, "lost_peer": lost_peer, "at": time.monotonic() - ago}
        os.write(self.reports[child], (json.dumps({"status": "error", **words}) + "\n").encode())

    def kill(self, child):
        self.engine.processes[child].popen.kill()
        self.engine.processes[child].popen.wait()

    def test_nobody_failed(self):
        self.assertIsNone(self.engine.check_alive())

    def test_the_one_that_was_lost_has_time_to_end_and_is_named(self):
        self.report(0, "another rank has gone", lost_peer=True)
        self.assertIsNone(self.engine.check_alive())
        self.kill(1)
        self.assertRegex(self.engine.check_alive(), r"^second \(pid \d+\) was ended by signal 9")

    def test_a_cause_goes_before_its_witness_though_it_speaks_later(self):
        self.report(0, "another rank has gone", lost_peer=True, ago=1.0)
        self.report(1, "out of memory", lost_peer=False)
        self.assertRegex(self.engine.check_alive(), r"^second .*out of memory")

    def test_a_child_that_fails_right_after_it_was_ready_is_quoted(self):
        for child, words in enumerate(("out of memory", "out of disk")):
            os.write(self.reports[child], b'{"status": "ready", "info": {}}\n')
            self.report(child, words, lost_peer=False)
        with self.assertRaisesRegex(LaunchError, "out of memory"):
            process_launch._wait_ready(self.engine.processes[0], self.engine)
        self.assertRegex(self.engine.check_alive(), r"^second .*out of disk")

    def test_at_start_the_one_that_was_lost_is_named_though_it_ends_late(self):
        witness, lost = self.engine.processes
        self.report(0, "another rank has gone", lost_peer=True)
        threading.Timer(0.5, lost.popen.kill).start()
        with self.assertRaisesRegex(LaunchError, "^second ended with exit code -9"):
            process_launch._wait_ready(witness, self.engine)

    def test_at_start_an_ended_witness_does_not_speak_for_the_cause(self):
        self.report(1, "another rank has gone", lost_peer=True)
        self.kill(1)
        threading.Timer(0.5, self.report, (0, "out of memory", False)).start()
        with self.assertRaisesRegex(LaunchError, "out of memory"):
            process_launch._wait_ready(self.engine.processes[0], self.engine)

    def test_at_start_a_witness_alone_is_named_in_the_end(self):
        for late in (0, 1):
            self.report(late, f"rank {late} is alone", lost_peer=True, ago=process_launch.PEER_GRACE_S)
            if late:
                self.kill(late)
            with self.assertRaisesRegex(LaunchError, f"rank {late} is alone"):
                process_launch._wait_ready(self.engine.processes[0], self.engine)

    def test_a_witness_alone_is_named_in_the_end(self):
        self.report(0, "another rank has gone", lost_peer=True, ago=process_launch.PEER_GRACE_S)
        self.assertRegex(self.engine.check_alive(), r"^first .*another rank has gone")


if __name__ == "__main__":
    unittest.main()
