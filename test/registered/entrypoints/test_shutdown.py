"""Shutdown on a signal: which requests are refused, finish or end with an error, and the exit status."""

import signal
import threading
import unittest
import unittest.mock

import httpx

from sglang.srt.entrypoints import shutdown
from sglang.srt.entrypoints.shutdown import EXIT_CUT, Drain, exit_during_start, handle_stop_signals
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

TOKENS = {"max_new_tokens": 40, "ignore_eos": True}
BODIES = {
    "/generate": {"input_ids": [5, 6], "sampling_params": TOKENS},
    "/v1/completions": {"prompt": [5, 6], "max_tokens": 40, "ignore_eos": True, "model": "default"},
}


class TestDrainOfAServer(CustomTestCase):
    def start(self, drain_timeout, delay_s):
        fake = self.fake = FakeServer(drain_timeout=drain_timeout).wait_ready()
        self.addCleanup(fake.stop)
        fake.scheduler.delay_s = delay_s
        self.replies, self.threads = {}, []

    def post(self, path, stream):
        def call():
            body = {**BODIES[path], "model": self.fake.context.served_model_name, "stream": stream}
            self.replies[path, stream] = httpx.post(self.fake.url + path, json=body, timeout=60)

        self.threads.append(threading.Thread(target=call))
        self.threads[-1].start()

    def post_all_kinds(self):
        for path in BODIES:
            for stream in (False, True):
                self.post(path, stream)
        self.fake.until(lambda: len(self.fake.scheduler.running) == 4)

    def ended(self):
        for thread in self.threads:
            thread.join(60)
        return self.fake.join()

    def test_requests_in_flight_finish_and_others_are_refused_meanwhile(self):
        self.start(drain_timeout=30.0, delay_s=0.05)
        self.post_all_kinds()
        self.assertEqual(httpx.get(f"{self.fake.url}/health", timeout=60).status_code, 200)
        self.fake.server.drain.ask(signal.SIGTERM)
        self.fake.until(lambda: httpx.get(f"{self.fake.url}/ready", timeout=60).status_code == 503)
        self.assertEqual(httpx.get(f"{self.fake.url}/health", timeout=60).text, "stopping")
        for path in BODIES:
            refused = httpx.post(self.fake.url + path, json={**BODIES[path], "model": "default"}, timeout=60)
            self.assertEqual((refused.status_code, refused.headers["retry-after"]), (503, "5"), refused.text)
            self.assertIn("shutting down", refused.text)
        self.assertEqual(self.ended(), 0)
        for kind, reply in self.replies.items():
            self.assertEqual(reply.status_code, 200, kind)
            self.assertIn("length", reply.text)
            self.assertNotIn("shutting down", reply.text)
            self.assertEqual(reply.text.endswith("data: [DONE]\n\n"), kind[1])

    def test_what_does_not_finish_in_time_is_told(self):
        self.start(drain_timeout=0.3, delay_s=0.1)
        self.post_all_kinds()
        self.fake.until(lambda: all(entry.output_ids for entry in self.fake.scheduler.running.values()))
        self.fake.server.drain.ask(signal.SIGTERM)
        self.assertEqual(self.ended(), EXIT_CUT)
        for (path, stream), reply in self.replies.items():
            self.assertIn("shutting down", reply.text, path)
            self.assertEqual(reply.status_code, 200 if stream else 503)
            self.assertEqual(reply.text.endswith("data: [DONE]\n\n"), stream)
            self.assertEqual(reply.headers.get("retry-after"), None if stream else "5")

    def test_an_idle_server_ends_at_once(self):
        self.start(drain_timeout=3600.0, delay_s=0.0)
        self.fake.server.drain.ask(signal.SIGTERM)
        self.assertEqual(self.ended(), 0)

    def test_an_engine_that_fails_meanwhile_decides_the_status(self):
        self.start(drain_timeout=3600.0, delay_s=1.0)
        self.post("/generate", stream=True)
        self.fake.until(lambda: self.fake.scheduler.running)
        self.fake.server.drain.ask(signal.SIGTERM)
        self.fake.engine.dead = "scheduler (pid 1) ended with exit code 3"
        self.assertEqual(self.ended(), 1)
        self.assertIn("exit code 3", self.replies["/generate", True].text)


class TestDeadline(CustomTestCase):
    def seconds_after(self, *signals, timeout_s=60.0):
        """What is left after signals that all come at the time 1000."""
        drain = Drain(None, timeout_s)
        self.assertFalse(drain.is_asked)
        with unittest.mock.patch.object(shutdown.time, "monotonic", return_value=1000.0):
            for signum in signals:
                drain.ask(signum)
            self.assertTrue(drain.is_asked)
            return drain._left_s()

    def test_what_each_signal_asks_for(self):
        term, interrupt, hang_up = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        for signals, seconds in (
            ([term], 60),
            ([hang_up], 60),
            ([term, term], 60),
            ([interrupt], shutdown.DRAIN_INTERRUPT_S),
            ([interrupt, term], shutdown.DRAIN_INTERRUPT_S),
            ([interrupt, interrupt], 0),
            ([term, interrupt], 0),
        ):
            self.assertEqual(self.seconds_after(*signals), seconds, signals)
        self.assertEqual(self.seconds_after(interrupt, timeout_s=1.0), 1.0)


class TestSignals(CustomTestCase):
    def setUp(self):
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.addCleanup(signal.signal, signum, signal.getsignal(signum))

    def test_a_signal_during_start_up_ends_it_once(self):
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handle_stop_signals(exit_during_start)
            with self.assertRaises(SystemExit) as caught:
                signal.raise_signal(signum)
            self.assertEqual(caught.exception.code, 128 + signum)
            signal.raise_signal(signum)  # while the end is on its way
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def test_nohup_is_heeded(self):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handle_stop_signals(exit_during_start)
        signal.raise_signal(signal.SIGHUP)


if __name__ == "__main__":
    unittest.main()
