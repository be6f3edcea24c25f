"""What the server admits, over HTTP: a full queue, requests that can never run, and time limits."""

import contextlib
import json
import socket
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import httpx

from sglang.srt.environ import envs
from sglang.srt.managers import prompt_text
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.utils.limits import MAX_RETRY_AFTER_S
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer, FakeServerTestCase

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "hi"}]


def sse(text):
    """Decoded events of a stream, whose last is [DONE]."""
    lines = [line[len("data: ") :] for line in text.split("\n") if line]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]


class TestFullQueue(FakeServerTestCase):
    settings = {"max_queued_requests": 3, "max_queued_tokens": 200}
    BODIES = (
        ("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 2}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    )

    def waiting(self, **body):
        """One call of ``body`` that waits until the scheduler is released."""
        self.fake.scheduler.frozen = True
        pool = self.enterContext(ThreadPoolExecutor(1))
        before = self.fake.context.manager.num_in_flight
        future = pool.submit(self.generate, **body)
        self.fake.until(lambda: self.fake.context.manager.num_in_flight > before)
        return future

    def test_503_says_when_to_come_again_and_tokenizes_nothing(self):
        held = self.waiting(text=["a", "b", "c"], sampling_params={"max_new_tokens": 1})
        with mock.patch.object(self.fake.tokenizer, "encode") as encode:
            for path, body in self.BODIES:
                for stream in (False, True):
                    reply = self.client.post(path, json={**body, "stream": stream})
                    self.assertEqual(reply.status_code, 503, reply.text)
                    self.assertIn("3 sequences (prompts x n) wait", reply.text)
                    self.assertTrue(1 <= int(reply.headers["retry-after"]) <= MAX_RETRY_AFTER_S)
            encode.assert_not_called()
        with envs.SGLANG_HEALTH_CHECK_TIMEOUT.override(1):  # let in, and not answered
            self.assertEqual(self.client.get("/health_generate").status_code, 503)
        sent = [getattr(message, "rid", "") for message in self.fake.scheduler.received[3:]]
        self.assertTrue(any(rid.startswith("HEALTH_CHECK") for rid in sent), sent)
        self.thaw()
        self.assertEqual(held.result().status_code, 200)
        for path, body in self.BODIES:
            self.assertEqual(self.client.post(path, json=body).status_code, 200)

    def connect(self, head, body=b""):
        connection = socket.create_connection(("127.0.0.1", int(self.fake.url.rpartition(":")[2])), 30)
        self.addCleanup(connection.close)
        lines = ["POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json", *head]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return connection

    def test_a_body_is_neither_waited_for_nor_parsed(self):
        held = self.waiting(text=["a", "b", "c"], sampling_params={"max_new_tokens": 1})
        refused = self.fake.context.manager.admission.num_refused
        for path, _ in self.BODIES:
            reply = self.client.post(path, content=b"{", headers={"content-type": "application/json"})
            self.assertEqual((reply.status_code, reply.json()["error"]["type"]), (503, "ServiceUnavailableError"))
            self.assertNotIn("connection", reply.headers)
        self.assertEqual(self.fake.context.manager.admission.num_refused, refused + len(self.BODIES))
        # The answer comes first; the connection then takes a short body, and the next request.
        connection = self.connect(["Content-Length: 8"])
        for rest in (b"{" * 8, b""):
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 503"))
            connection.sendall(rest + b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200"))
            if rest:
                connection.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        # Who sends much may do so to its end, and reads the answer, not a reset.
        for head in (["Content-Length: 8000000"], ["Transfer-Encoding: chunked"], ["Content-Length: 9", "Expect: x"]):
            with contextlib.suppress(BrokenPipeError):
                connection = self.connect(head, b"x" * 8_000_000 if "8000000" in head[0] else b"")
            answer = b""
            while data := connection.recv(65536):
                answer += data
            self.assertIn(b"\r\nconnection: close\r\n", answer.lower())
            self.assertIn(b"The queue is full", answer)
        self.assertEqual(self.client.get("/generate").status_code, 405)
        self.thaw()
        self.assertEqual(held.result().status_code, 200)

    def test_a_body_on_its_way_holds_no_place_and_one_that_came_does(self):
        admission = self.fake.context.manager.admission
        body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}}).encode()
        slow = [self.connect([f"Content-Length: {len(body)}"], body[:5]) for _ in range(5)]
        self.assertEqual((self.generate(text="abc").status_code, admission.num_requests), (200, 0))
        # While each of them waits for its prompt's rendering, its place is taken.
        entered, go_on = threading.Event(), threading.Event()

        def render(*_, **__):
            entered.set()
            go_on.wait(60)
            return "a"

        chat = {"messages": HI, "max_tokens": 1}
        with (
            mock.patch.object(self.fake.tokenizer, "apply_chat_template", render),
            ThreadPoolExecutor(3) as pool,
        ):
            calls = [pool.submit(self.client.post, "/v1/chat/completions", json=chat) for _ in range(3)]
            self.fake.until(lambda: admission.num_requests == 3)
            self.assertTrue(entered.wait(60))
            slow[0].sendall(body[5:])  # past the first check, and refused where it comes to its end
            self.assertTrue(slow[0].recv(65536).startswith(b"HTTP/1.1 503"))
            self.assertEqual(self.client.post("/v1/chat/completions", json=chat).status_code, 503)
            go_on.set()
            self.assertEqual([call.result().status_code for call in calls], [200] * 3)
        slow[1].sendall(body[5:])
        self.assertTrue(slow[1].recv(65536).startswith(b"HTTP/1.1 200"))
        for content in (b"{", b"[1]", json.dumps({"text": ""}).encode()):
            reply = self.client.post("/generate", content=content, headers={"content-type": "application/json"})
            self.assertEqual(reply.status_code, 400)
            self.fake.until(lambda: admission.num_requests == 0)

    def test_many_at_once_find_the_room_that_there_is(self):
        self.fake.scheduler.frozen = True
        body = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
        with ThreadPoolExecutor(20) as pool:
            calls = [pool.submit(httpx.post, f"{self.fake.url}/generate", json=body, timeout=60) for _ in range(20)]
            self.fake.until(lambda: sum(call.done() for call in calls) == 17)
            self.fake.until(lambda: len(self.fake.scheduler.received) >= 3)
            self.thaw()
            statuses = sorted(call.result().status_code for call in calls)
        self.assertEqual(statuses, [200] * 3 + [503] * 17)

    def thaw(self):
        scheduler, received = self.fake.scheduler, list(self.fake.scheduler.received)
        scheduler.frozen = False
        for message in received:
            if isinstance(message, TokenizedGenerateReqInput):
                scheduler._enqueue(message)

    def test_what_runs_or_left_counts_no_more(self):
        self.fake.scheduler.delay_s = 0.05
        running = [{"text": ["a", "b", "c"], "sampling_params": {"max_new_tokens": 40}} for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            replies = []
            for count, body in enumerate(running, 1):
                replies.append(pool.submit(self.generate, **body))
                self.fake.until(lambda: len(self.fake.scheduler.running) == 3 * count)  # noqa: B023
                self.fake.until(lambda: self.fake.context.manager.admission.num_requests == 0)
                self.assertEqual(len(self.fake.scheduler.running), 3 * count)
            self.fake.scheduler.delay_s = 0
            self.assertEqual([reply.result().status_code for reply in replies], [200] * 3)
        self.fake.scheduler.frozen = True
        for _ in range(3):
            with self.assertRaises(httpx.ReadTimeout):
                httpx.post(
                    f"{self.fake.url}/generate",
                    json={"text": ["a"] * 3, "sampling_params": {"max_new_tokens": 9}},
                    timeout=0.3,
                )
            self.fake.until(lambda: self.fake.context.manager.num_in_flight == 0)
        admission = self.fake.context.manager.admission
        self.assertEqual((admission.num_requests, admission.num_tokens), (0, 0))

    def test_what_can_never_be_taken_is_400_with_both_numbers(self):
        for body, numbers in (
            ({"text": ["a", "b"], "sampling_params": {"n": 2}}, ("4 answers", "at most 3")),
            ({"text": ["a", "b"], "sampling_params": {"max_new_tokens": 110}}, ("224 tokens", "at most 200 may wait")),
        ):
            reply = self.generate(**body)
            self.assertEqual(reply.status_code, 400)
            for number in numbers:
                self.assertIn(number, reply.text)
        self.assertEqual(self.fake.context.manager.admission.num_requests, 0)

    def test_tokens_are_bounded_too(self):
        held = self.waiting(text="a", sampling_params={"max_new_tokens": 120})
        reply = self.generate(text="a", sampling_params={"max_new_tokens": 120})
        self.assertEqual(reply.status_code, 503, reply.text)
        self.assertIn("--max-queued-tokens", reply.text)
        admission = self.fake.context.manager.admission
        missing = 200 - admission.num_tokens
        admission.add(0, missing)  # full to the last token
        with mock.patch.object(self.fake.tokenizer, "encode") as encode:
            self.assertEqual(self.generate(text="a", sampling_params={"max_new_tokens": 1}).status_code, 503)
            encode.assert_not_called()
        admission.remove(0, missing)
        self.thaw()
        self.assertEqual(held.result().status_code, 200)

    def test_bounded_by_default(self):
        fake = FakeServer().wait_ready()
        self.addCleanup(fake.stop)
        self.assertGreaterEqual(fake.context.manager.admission.max_requests, 1024)


class TestFullQueueWithKey(FakeServerTestCase):
    settings = {"max_queued_requests": 1, "api_key": "k"}

    def test_who_has_no_key_learns_nothing_of_the_queue(self):
        admission = self.fake.context.manager.admission
        admission.add(1, 0)
        for headers, status in (({}, 401), ({"authorization": "Bearer no"}, 401), ({"authorization": "Bearer k"}, 503)):
            reply = self.client.post("/generate", content=b"{", headers=headers)
            self.assertEqual((reply.status_code, "retry-after" in reply.headers), (status, status == 503))
        self.assertEqual(admission.num_refused, 1)
        admission.remove(1, 0)


class TestTimeLimits(FakeServerTestCase):
    settings = {"request_timeout": 60.0, "enable_metrics": True}
    BODIES = (
        ("/generate", {"text": "abc"}),
        ("/generate", {"text": ["abc", "de"], "sampling_params": {"n": 2}}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 100}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 100, "ignore_eos": True}),
    )

    def ended(self, path, **options):
        reply = self.client.post(path, **options)
        manager = self.fake.context.manager
        self.assertEqual((manager.num_in_flight, manager.admission.num_requests), (0, 0))
        return reply

    def sequences(self):
        return [m.rid for m in self.fake.scheduler.received if isinstance(m, TokenizedGenerateReqInput)]

    def test_requests_that_wait_end_and_are_aborted(self):
        self.fake.scheduler.frozen = True
        before = self.fake.context.manager.num_timed_out
        for stream in (False, True):
            for path, body in self.BODIES:
                reply = self.ended(path, json={**body, "stream": stream, "request_timeout": 0.1})
                self.assertEqual((reply.status_code, reply.json()["error"]["type"]), (504, "TimeoutError"))
                self.assertIn("within 0.1 s", reply.json()["message"])
        # The abort of a test before this one may arrive as late as here.
        self.fake.until(lambda: set(self.sequences()) <= set(self.fake.scheduler.aborted_rids()))
        self.fake.scheduler.frozen = False
        count = self.fake.context.manager.num_timed_out
        self.assertEqual(count - before, 2 * len(self.BODIES))
        self.assertRegex(self.client.get("/metrics").text, f"num_timed_out_requests_total{{.*}} {count}.0\n")

    def test_a_stream_under_way_gets_an_error_and_its_end(self):
        self.fake.scheduler.delay_s = 0.02
        for path, body in (self.BODIES[0], *self.BODIES[2:]):
            reply = self.ended(path, json={**body, "stream": True}, headers={"x-request-timeout": "0.5"})
            self.assertEqual(reply.status_code, 200)
            events = sse(reply.text)
            self.assertEqual(events[-1]["error"]["code"], 504)
            self.assertGreater(len(events), 2)

    def test_the_least_of_header_body_and_flag_holds(self):
        self.fake.scheduler.frozen = True
        for body, header, expected in ((9, "0.1", "0.1 s"), (0.1, "9", "0.1 s"), (None, "0.2", "0.2 s")):
            options = {"json": {"text": "a", "request_timeout": body}, "headers": {"x-request-timeout": header}}
            self.assertIn(expected, self.ended("/generate", **options).json()["message"])
        manager = self.fake.context.manager
        with mock.patch.object(manager, "server_args", replace(manager.server_args, request_timeout=0.3)):
            for body in ({}, {"request_timeout": 1000}):
                self.assertIn("0.3 s", self.ended("/generate", json={"text": "a", **body}).json()["message"])

    def test_tokenizing_counts(self):
        def slow(*_, **__):
            time.sleep(1)
            return [5]

        with (
            mock.patch.object(self.fake.tokenizer, "encode", slow),
            mock.patch.object(prompt_text, "_LONG_TEXT_CHARS", 1),
        ):
            for body in ({"text": "abc"}, {"text": ["abc", "abc"], "stream": True}):
                self.assertEqual(self.ended("/generate", json={**body, "request_timeout": 0.1}).status_code, 504)
        self.assertEqual(self.sequences(), [])

    def test_bad_limits(self):
        for value in (0, -1):
            self.assertEqual(self.generate(text="a", request_timeout=value).status_code, 400)
        for value in ("nan", "inf", "-1", "0", "soon", "x" * 5000):
            reply = self.client.post("/generate", json={"text": "a"}, headers={"x-request-timeout": value})
            self.assertEqual((reply.status_code, len(reply.text) < 500), (400, True), value)


if __name__ == "__main__":
    unittest.main()
