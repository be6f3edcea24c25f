"""What is logged of requests at each level and in both formats, and of HTTP."""

import contextlib
import errno
import io
import json
import logging
import unittest
from unittest import mock

from sglang.srt.entrypoints import http_logs
from sglang.srt.managers.io_struct import FinishReason, GenerateReqInput
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")


class FakeState:
    rid = "r\n1"
    text = "naïve\n" + "x" * 3000
    output_ids = [1, 2, 3]
    finish_reason = FinishReason(type="stop", matched=2)
    latency = 0.25


ASKED = GenerateReqInput(text=["a\nb", "c" * 3000], sampling_params={"temperature": 0, "stop": ["d" * 3000]})


class TestRequestLog(CustomTestCase):
    def lines(self, level, form):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), self.assertLogs("sglang", "INFO") as logs:
            logging.getLogger("sglang").info("something else")
            log = RequestLog(ServerArgs(log_requests=True, log_requests_level=level, log_requests_format=form))
            log.received(ASKED, [FakeState])
            log.finished(FakeState)
        if form == "json":
            return [json.loads(line) for line in said.getvalue().splitlines()]
        return [record.getMessage() for record in logs.records[1:]]

    def test_keys_of_each_level(self):
        names = [
            ({"rids", "stream"}, {"rid", "reason", "tokens", "e2e_latency"}),
            ({"sampling_params"}, set()),
            ({"text"}, {"output"}),
            (set(), set()),
        ]
        came, ended = set(), set()
        for level, (more_came, more_ended) in enumerate(names):
            came, ended = came | more_came, ended | more_ended
            first, last = self.lines(level, "json")
            self.assertEqual(set(first), came | {"time", "event"})
            self.assertEqual(set(last), ended | {"time", "event"})
            self.assertEqual((last["event"], last["reason"]), ("finish", {"type": "stop", "matched": 2}))
            first, last = self.lines(level, "text")
            for name in came:
                self.assertIn(f"{name}=", first)
            self.assertNotIn("\n", first + last)

    def test_what_is_long_is_cut_unless_all_is_asked_for(self):
        for form in ("text", "json"):
            for line in self.lines(2, form):
                self.assertLess(len(str(line)), 4000)
        first, last = self.lines(3, "json")
        self.assertEqual((first["text"], last["output"]), (ASKED.text, FakeState.text))
        self.assertEqual(first["sampling_params"], ASKED.sampling_params)
        self.assertIn("(3006 characters)", self.lines(2, "json")[1]["output"])

    def test_a_disk_that_is_full_ends_no_request(self):
        full = mock.Mock(write=mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with contextlib.redirect_stderr(full):
            log = RequestLog(ServerArgs(log_requests=True, log_requests_format="json"))
            log.received(ASKED, [FakeState])
            log.finished(FakeState)
        self.assertEqual(full.write.call_count, 2)

    def test_nothing_without_the_flag(self):
        with self.assertNoLogs("sglang", "INFO"):
            log = RequestLog(ServerArgs(log_requests_level=3))
            log.received(ASKED, [FakeState])
            log.finished(FakeState)


class TestHttpLogs(CustomTestCase):
    def passes(self, path, status):
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s", None, None)
        record.args = ("client", "GET", path, "1.1", status)
        return http_logs._ACCESS_FILTER.filter(record)

    def test_prefixes_that_are_quiet(self):
        self.addCleanup(http_logs.bound_http_logs)
        http_logs.bound_http_logs(["/v1/models", "/get_"])
        self.assertEqual(
            [self.passes(*case) for case in (("/get_load?x=1", 200), ("/get_load", 500), ("/generate", 200))],
            [False, True, True],
        )
        http_logs.bound_http_logs()
        self.assertTrue(self.passes("/get_load", 200))

    def test_the_level_of_http_is_its_own(self):
        for settings, logs in (({}, False), ({"log_level_http": "info"}, True)):
            fake = FakeServer(**settings)  # whose own level is "error"
            try:
                self.assertEqual(fake.server.config.access_log, logs)
            finally:
                fake.wait_ready().stop()


if __name__ == "__main__":
    unittest.main()
