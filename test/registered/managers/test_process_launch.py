"""Which of several failed or silent processes the launcher names, and how a child follows its parent."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
import types
import unittest
from dataclasses import replace
from unittest import mock

import msgspec
import numpy as np

from sglang.srt.arg_groups.plan import LaunchPlan
from sglang.srt.entrypoints import launch
from sglang.srt.managers import process_launch, pulse
from sglang.srt.managers.child_context import STACKS_SIGNAL, LaunchConfig
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.managers.process_launch import ChildProcess, EngineProcesses, LaunchError
from sglang.srt.managers.pulse import Pulse, PulseReader
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")


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
            pulse = PulseReader()
            self.addCleanup(pulse.close)
            self.engine.processes.append(ChildProcess(name, child, read, pulse))
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
        self.assertRegex(self.engine.check_alive(), r"^first .*out of memory")
        self.engine.processes[0].exit_report = None
        self.assertRegex(self.engine.check_alive(), r"^second .*out of disk")

    def test_a_report_that_comes_in_two_pieces_is_one(self):
        os.write(self.reports[0], b'{"status": "ready", "in')
        self.assertIsNone(self.engine.check_alive())
        os.write(self.reports[0], b'fo": {"size": 3}}\n{"status": "asked", "signal": 15}\n')
        self.assertEqual(process_launch._wait_ready(self.engine.processes[0], self.engine), {"size": 3})
        self.assertTrue(self.engine.is_asked_to_end())

    def test_descriptors_may_have_numbers_of_any_size(self):
        """As in a program that has a thousand files open and makes an Engine."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1200), limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        child = self.engine.processes[0]
        child.ready_fd = fcntl.fcntl(child.ready_fd, fcntl.F_DUPFD, 1100)
        self.addCleanup(os.close, child.ready_fd)
        os.write(self.reports[0], b'{"status": "ready", "info": {"size": 3}}\n')
        self.assertEqual(process_launch._wait_ready(child, self.engine), {"size": 3})
        self.assertIsNone(self.engine.check_alive())

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
        self.report(0, "rank 0 is alone", lost_peer=True, ago=process_launch.PEER_GRACE_S)
        with self.assertRaisesRegex(LaunchError, "rank 0 is alone"):
            process_launch._wait_ready(self.engine.processes[0], self.engine)

    def test_at_start_an_ended_witness_alone_is_named_in_the_end(self):
        self.report(1, "rank 1 is alone", lost_peer=True, ago=process_launch.PEER_GRACE_S)
        self.kill(1)
        with self.assertRaisesRegex(LaunchError, "rank 1 is alone"):
            process_launch._wait_ready(self.engine.processes[0], self.engine)

    def test_a_witness_alone_is_named_in_the_end(self):
        self.report(0, "another rank has gone", lost_peer=True, ago=process_launch.PEER_GRACE_S)
        self.assertRegex(self.engine.check_alive(), r"^first .*another rank has gone")

    def test_those_that_make_no_progress_are_named_and_print_their_stacks(self):
        self.engine.watchdog_timeout_s = 5.0
        for silent, named in (((0, 4), None), ((0, 6), "second"), ((6, 6), "first.*, second")):
            for child, seconds in zip(self.engine.processes, silent, strict=True):
                child.pulse.silent_s = lambda seconds=seconds: seconds
            with mock.patch.object(subprocess.Popen, "send_signal") as send:
                found = self.engine.check_alive()
            self.assertEqual(send.call_args_list, [mock.call(STACKS_SIGNAL)] * sum(s > 5 for s in silent))
            if named is None:
                self.assertIsNone(found)
            else:
                self.assertRegex(found, rf"^{named} \(pid \d+\): no progress for more than --watchdog-timeout 5 s")

    def test_a_stopped_one_holds_up_the_rest_and_is_named_alone(self):
        self.engine.watchdog_timeout_s = 5.0
        witness, stopped = self.engine.processes
        witness.pulse.silent_s = lambda: 6.0
        stopped.popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.popen.pid, os.WSTOPPED)
        self.assertRegex(self.engine.check_alive(), r"^second \(pid \d+\): stopped by a signal")

    def test_who_stalls_is_known_before_the_watchdog_ends_the_server(self):
        self.engine.watchdog_timeout_s = 300.0
        first, second = self.engine.processes
        for child, silent in ((first, 0.0), (second, 19.0)):
            child.pulse.last_silent_s = silent
        self.assertIsNone(self.engine.stalled(20.0))
        self.assertRegex(self.engine.stalled(18.0), r"^second \(pid \d+\) has made no progress for 19 s")
        second.pulse.last_silent_s = 1.5
        self.assertIsNone(self.engine.stalled(20.0))
        for child in (first, second):
            child.popen.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.popen.pid, os.WSTOPPED)
        self.assertRegex(self.engine.stalled(20.0), "^second")  # the first has turned since the last look
        second.popen.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, second.popen.pid, os.WCONTINUED)
        self.assertIsNone(self.engine.stalled(20.0))


class TestPulse(CustomTestCase):
    def test_silence_is_counted_from_look_to_look(self):
        with mock.patch.object(pulse.time, "monotonic", return_value=100.0) as clock:
            reader = PulseReader()
            child = Pulse(reader.descriptor)

            def silent_after(seconds):
                clock.return_value += seconds
                return reader.silent_s()

            self.assertEqual(silent_after(1), 0)  # has not begun
            child.beat()
            self.assertEqual([silent_after(1) for _ in range(3)], [0, 1, 2])
            # A parent that was stopped itself counts no such time, or its first look would end a healthy server.
            self.assertEqual(silent_after(1000), 2 + pulse.MAX_GAP_S)
            child.beat()
            self.assertEqual(silent_after(1), 0)
            reader.close()
            reader.close()


class TestRealChild(CustomTestCase):
    """The detokenizer under the launcher."""

    def setUp(self):
        folder = write_tokenizer(self.enterContext(tempfile.TemporaryDirectory()), byte_level_tokenizer())
        numpys = {"dtype": np.str_("float32"), "watchdog_timeout": np.float64(3)}  # as a caller of Engine may give
        args = ServerArgs(model_path=folder, tokenizer_path=folder, log_level="error", **numpys)
        self.engine = EngineProcesses(IpcNames.create(), [], watchdog_timeout_s=2.5)
        self.addCleanup(self.engine.shutdown)
        config = LaunchConfig(server_args=args, ipc=self.engine.ipc)
        self.child = process_launch._start("detokenizer", process_launch.DETOKENIZER_MODULE, config, 1, {})
        self.engine.processes.append(self.child)
        process_launch._wait_ready(self.child, self.engine)

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not (found := condition()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        return found

    def test_idle_is_no_silence_but_a_stop_is(self):
        for _ in range(40):
            self.assertIsNone(self.engine.check_alive())
            time.sleep(0.1)
        self.child.popen.send_signal(signal.SIGSTOP)
        self.assertRegex(self.until(self.engine.check_alive), r"^detokenizer \(pid \d+\): stopped by a signal")
        self.engine.shutdown(grace_s=60.0)
        self.assertEqual(self.child.popen.returncode, -signal.SIGKILL)

    def test_signals_from_others_are_passed_on_and_the_order_is_obeyed(self):
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.child.popen.send_signal(signum)
            self.until(lambda signum=signum: not self.engine.check_alive() and self.child.asked_by == signum)
            self.assertTrue(self.engine.is_asked_to_end())
        self.engine.shutdown(grace_s=60.0)
        self.assertEqual(self.child.popen.returncode, 0)

    def test_the_end_of_the_parent_ends_the_child_and_removes_the_folder(self):
        self.child.popen.stdin.close()
        self.assertEqual(self.child.popen.wait(60), 1)
        self.assertFalse(os.path.exists(self.engine.ipc.directory))


class TestOrder(CustomTestCase):
    """The inbox is bound before anyone connects, and a failed launch leaves no files."""

    def test_inbox_then_children(self):
        counts, kept = [], []

        def keep(*arguments):
            kept.append(TokenizerManager(*arguments))  # its sockets are not to be closed by a garbage collection
            return kept[-1]

        def fail(args, ipc, variables, needed):
            self.assertIn("tokenizer", os.listdir(ipc.directory))
            ipc.remove()
            raise LaunchError("planted", user_error=False)

        model = types.SimpleNamespace(context_len=64, vocab_size=8)
        args = ServerArgs(skip_tokenizer_init=True)
        plan = LaunchPlan(args, model)
        with (
            mock.patch.object(launch, "launch_engine_processes", fail),
            mock.patch.object(launch, "TokenizerManager", keep),
        ):
            for _ in range(3):
                with self.assertRaisesRegex(LaunchError, "planted"):
                    launch.start_engine(plan)
                time.sleep(0.2)  # the library closes in the background
                counts.append(len(os.listdir("/proc/self/fd")))
        self.assertEqual(len(set(counts)), 1, counts)


class TestSecrets(CustomTestCase):
    def test_children_are_told_no_key(self):
        args = ServerArgs(api_key="sesame", admin_api_key="sesame2", device="cpu")
        with (
            mock.patch.object(process_launch, "_start") as start,
            mock.patch.object(process_launch, "_wait_ready", return_value={}),
        ):
            ipc = IpcNames.create()
            self.addCleanup(ipc.remove)
            process_launch.launch_engine_processes(args, ipc, {}, {})
        configs = [call.args[2] for call in start.call_args_list]
        self.assertEqual(len(configs), 2)
        self.assertFalse(any(b"sesame" in msgspec.json.encode(config) for config in configs))
        self.assertEqual(configs[0].server_args, replace(args, api_key=None, admin_api_key=None))


if __name__ == "__main__":
    unittest.main()
