"""Connections: slow and silent clients are cut, healthy ones are not, numbers are bounded, logs stay short."""

import asyncio
import json
import logging
import resource
import socket
import sys
import time
import types
import unittest
from unittest import mock

import h11
import httpx

from sglang.srt.entrypoints import connections, http_logs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer, FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=14, suite="stage-a-test-cpu")

HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def request(**body):
    content = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


class Connections(FakeServerTestCase):
    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", int(self.fake.url.rpartition(":")[2])), 10)
        self.addCleanup(connection.close)
        connection.sendall(data)
        return connection

    def rest(self, connection):
        """Everything received until the server closes."""
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
        return received

    @property
    def num_open(self):
        return len(self.fake.server.server_state.connections)


class TestSlowClients(Connections):
    def test_half_headers_are_closed_next_to_a_healthy_stream(self):
        self.fake.scheduler.delay_s = 0.04
        with mock.patch.object(connections, "HEADER_TIMEOUT_S", 0.3):
            with self.client.stream("POST", "/generate", json={"text": "abc", "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                slow = [self.connect(data) for data in (b"", b"POST", HEAD) for _ in range(100)]
                for connection in slow:
                    self.assertEqual(self.rest(connection), b"")
                self.assertEqual(list(lines)[-2:], ["data: [DONE]", ""])

    def test_a_body_that_trickles_in_is_cut_and_a_slow_one_is_not(self):
        with mock.patch.multiple(connections, BODY_TIMEOUT_S=0.3, MIN_BODY_BYTES_PER_S=100):
            body = json.dumps({"text": "abc", "pad": "x" * 400, "sampling_params": {"max_new_tokens": 2}}).encode()
            head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
            self.assertEqual(self.rest(self.connect(head + body[:5])), b"")
            slow = self.connect(head + body[:300])
            time.sleep(1.5)
            slow.sendall(body[300:])
            self.assertTrue(slow.recv(100).startswith(b"HTTP/1.1 200"))
        self.assertEqual(self.fake.context.manager.num_in_flight, 0)

    def test_an_idle_engine_and_a_kept_connection_are_not_the_clients_fault(self):
        with mock.patch.multiple(connections, HEADER_TIMEOUT_S=0.2, BODY_TIMEOUT_S=0.2, WRITE_TIMEOUT_S=0.2):
            self.fake.scheduler.delay_s = 0.5
            connection = self.connect(request(text="abc", stream=True, sampling_params={"max_new_tokens": 5}))
            received = b""
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += connection.recv(65536)
            self.fake.scheduler.delay_s = 0
            time.sleep(1.5)
            connection.sendall(request(text="abc"))
            self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 200"))

    def test_who_never_reads_is_cut_and_its_request_aborted(self):
        with mock.patch.object(connections, "WRITE_TIMEOUT_S", 0.5):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.addCleanup(connection.close)
            connection.connect(("127.0.0.1", int(self.fake.url.rpartition(":")[2])))
            # Answers of some 15 MB: no kernel takes so much for a reader that does not read.
            prompts = [[5] * 100] * 200
            options = {"return_logprob": True, "top_logprobs_num": 100, "logprob_start_len": 99}
            connection.sendall(
                request(input_ids=prompts, stream=True, sampling_params={"max_new_tokens": 20}, **options)
            )
            self.fake.until(lambda: self.fake.context.manager.num_in_flight > 0, 20)
            open_before = self.num_open
            self.fake.until(lambda: self.num_open < open_before, 30)
            self.fake.until(lambda: self.fake.context.manager.num_in_flight == 0)

    def test_half_closed_sockets_get_quick_answers_and_lose_slow_ones(self):
        quick = self.connect(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        quick.shutdown(socket.SHUT_WR)
        self.assertTrue(self.rest(quick).startswith(b"HTTP/1.1 200"))
        self.fake.scheduler.frozen = True
        slow = self.connect(request(text="abc"))
        self.fake.until(lambda: self.fake.context.manager.num_in_flight == 1)
        slow.shutdown(socket.SHUT_WR)
        self.rest(slow)
        self.fake.until(lambda: self.fake.context.manager.num_in_flight == 0)
        half_body = self.connect(HEAD + b"Content-Length: 100\r\n\r\n{")
        half_body.shutdown(socket.SHUT_WR)
        self.assertEqual(self.rest(half_body), b"")

    def test_who_leaves_while_sending_is_no_error_of_ours(self):
        with self.assertNoLogs("sglang", "WARNING"):
            for _ in range(3):
                self.connect(HEAD + b"Content-Length: 100\r\n\r\n{").close()
            self.assertEqual(self.client.get("/v1/models").status_code, 200)  # they were accepted before it
            self.fake.until(lambda: self.num_open == 1 and not self.fake.server.server_state.tasks)


class TestPackets(Connections):
    def test_a_head_goes_with_its_body_or_with_its_turn(self):
        sent, turn = [], []
        transport = types.SimpleNamespace(write=sent.append, close=lambda: sent.append("closed"))
        connection = types.SimpleNamespace(
            loop=types.SimpleNamespace(call_soon=turn.append), close=lambda transport: transport.close()
        )
        wrapped = connections._Transport(transport, connection)
        head, body = b"HTTP/1.1 200 OK\r\n\r\n", b"{}"
        wrapped.write(head)
        wrapped.write(body)
        wrapped.write(body)
        turn.pop()()
        self.assertEqual(sent, [head + body, body])
        sent.clear()
        wrapped.write(head)
        self.assertEqual(sent, [])
        turn.pop()()
        wrapped.write(head)
        wrapped.close()
        self.assertEqual(sent, [head, head, "closed"])

    def test_connections_find_out_that_a_machine_is_gone(self):
        self.client.get("/v1/models")
        for connection in self.fake.server.server_state.connections:
            accepted = connection.transport.get_extra_info("socket")
            self.assertEqual(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
            self.assertEqual(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60)

    def test_the_kernel_queues_more_than_one_turn_accepts(self):
        listener = self.fake.server.servers[0].sockets[0]
        # Linux tells a listener's backlog as tcpi_sacked, the byte order being the machine's.
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        self.assertGreaterEqual(int.from_bytes(info[28:32], sys.byteorder), 1024)


class TestChunks(Connections):
    """Events of a stream are framed without h11; a client reads the same."""

    def stream(self, version=b"1.1", num_tokens=9):
        """Bytes received from a socket, and how many chunks were written without h11."""
        written = []
        write_chunk = connections.Connection._write_chunk

        def counted(connection, chunk):
            written.append(write_chunk(connection, chunk))
            return written[-1]

        content = request(text="abc", stream=True, sampling_params={"max_new_tokens": num_tokens, "ignore_eos": True})
        with mock.patch.object(connections.Connection, "_write_chunk", counted):
            content = content.replace(b"HTTP/1.1\r\n", b"HTTP/%b\r\nConnection: close\r\n" % version)
            return self.rest(self.connect(content)), sum(written)

    def events(self, body):
        data = [json.loads(line[6:]) for line in body.split(b"\n\n") if line not in (b"", b"data: [DONE]")]
        return [event["output_ids"] for event in data]

    def test_a_stream_in_chunks_is_that_of_an_old_client_without(self):
        self.fake.scheduler.delay_s = 0.005
        reply, num_written = self.stream()
        head, _, framed = reply.partition(b"\r\n\r\n")
        self.assertIn(b"transfer-encoding: chunked", head.lower())
        chunks = []
        while framed:
            size, _, framed = framed.partition(b"\r\n")
            chunk, framed = framed[: int(size, 16)], framed[int(size, 16) :]
            self.assertTrue(framed.startswith(b"\r\n"))
            chunks, framed = [*chunks, chunk], framed[2:]
        self.assertEqual(chunks[-2:], [b"data: [DONE]\n\n", b""])
        self.assertEqual(num_written, len(chunks) - 3)  # all but the first event and the end
        old, num_written = self.stream(b"1.0")
        self.assertEqual(num_written, 0)
        head, _, body = old.partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head.lower())
        self.assertEqual(self.events(body)[-1], self.events(b"".join(chunks))[-1])
        self.assertTrue(body.endswith(b"data: [DONE]\n\n"))

    def test_where_a_chunk_is_not_written(self):
        written = []
        states = {"disconnected": False, "write_paused": False, "our_state": h11.SEND_BODY}

        def write(chunk=b"a" * 17, **changed):
            now = types.SimpleNamespace(**{**states, **changed})
            transport = types.SimpleNamespace(write=written.append)
            connection = types.SimpleNamespace(cycle=now, flow=now, conn=now, transport=transport)
            return connections.Connection._write_chunk(connection, chunk)

        refused = ({"disconnected": True}, {"write_paused": True}, {"our_state": h11.DONE}, {"our_state": h11.ERROR})
        for changed in (*refused, {"chunk": b""}):
            self.assertFalse(write(**changed), changed)
        self.assertEqual(written, [])
        self.assertTrue(write())
        self.assertEqual(written, [b"11\r\n" + b"a" * 17 + b"\r\n"])


class TestNumbers(Connections):
    settings = {"max_connections": 3}

    def test_more_connections_get_503_then_nothing(self):
        self.client.close()
        type(self).client = httpx.Client(base_url=self.fake.url, timeout=10)
        self.fake.until(lambda: self.num_open == 0)
        held = [self.connect() for _ in range(3)]
        self.fake.until(lambda: self.num_open == 3)
        reply = httpx.get(f"{self.fake.url}/v1/models")
        self.assertEqual((reply.status_code, reply.headers["retry-after"]), (503, "1"))
        self.assertIn("--max-connections", reply.json()["error"]["message"])
        self.fake.until(lambda: self.num_open == 3)
        with mock.patch.object(connections, "MAX_REFUSED_CONNECTIONS", 0):
            self.assertEqual(self.rest(self.connect(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")), b"")
        held[0].close()
        self.fake.until(lambda: self.num_open == 2)
        self.assertEqual(httpx.get(f"{self.fake.url}/v1/models").status_code, 200)

    def test_descriptors_are_raised_or_fewer_connections_served(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with mock.patch.object(resource, "setrlimit") as raised:
            with mock.patch.object(resource, "getrlimit", return_value=(64, 100_000)):
                self.assertEqual(connections.fit_connections(1000), 1000)
            (_, (soft, hard)), _ = raised.call_args
            self.assertGreater(soft, 1000)
            self.assertEqual(hard, 100_000)
            with (
                mock.patch.object(resource, "getrlimit", return_value=(64, 300)),
                self.assertLogs(connections.logger, "WARNING") as logs,
            ):
                room = connections.fit_connections(1000)
            self.assertTrue(0 < room < 300 - connections.MAX_REFUSED_CONNECTIONS - connections.SPARE_DESCRIPTORS)
            self.assertIn("ulimit -n", str(logs.output))
        self.assertEqual(limits, resource.getrlimit(resource.RLIMIT_NOFILE))


class TestLogs(CustomTestCase):
    def test_probes_write_no_line_and_long_paths_are_cut(self):
        fake = FakeServer(enable_metrics=True).wait_ready()
        self.addCleanup(fake.stop)
        fake.scheduler.received.clear()
        with self.assertLogs("uvicorn.access", "INFO") as logs:
            for path in ("/health", "/ready", "/metrics", "/health?x=1", "/nope/" + "y" * 9000):
                httpx.get(fake.url + path)
        self.assertEqual(len(logs.output), 1, logs.output)
        self.assertLess(len(logs.output[0]), 500)
        self.assertFalse([m for m in fake.scheduler.received if hasattr(m, "sampling_params")])

    def test_a_crowd_of_refusals_is_logged_in_part_and_counted(self):
        access = http_logs.AccessFilter()

        def passes(status):
            args = ("1.2.3.4:5", "POST", "/generate", "1.1", status)
            return access.filter(logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "", args, None))

        with mock.patch.object(http_logs.time, "monotonic", return_value=5.5):
            self.assertEqual(sum(passes(503) for _ in range(100)), 10)
            self.assertTrue(passes(200))
        with mock.patch.object(http_logs.time, "monotonic", return_value=6.5):
            self.assertTrue(passes(503))
        fake = FakeServer(max_queued_requests=1).wait_ready()
        self.addCleanup(fake.stop)
        fake.context.manager.admission.add(1, 0)
        with self.assertLogs("sglang", "WARNING") as logs:
            for _ in range(20):
                self.assertEqual(httpx.post(f"{fake.url}/generate").status_code, 503)
        self.assertLess(len(logs.output), 20)
        self.assertIn("The queue is full: 1 sequences", logs.output[0])

    def test_ids_are_escaped_and_cut(self):
        fake = FakeServer(log_requests=True).wait_ready()
        self.addCleanup(fake.stop)
        for rid in ("a\n[2026-01-01 INFO] forged \x1b[31m", "x" * 256):
            with self.assertLogs("sglang", "INFO") as logs:
                httpx.post(
                    f"{fake.url}/generate", json={"text": "a", "rid": rid, "sampling_params": {"stop": ["s" * 900]}}
                )
            self.assertEqual(len(logs.records), 2)
            for record in logs.records:
                message = record.getMessage()
                self.assertTrue(message.isprintable(), message)
                self.assertLess(len(message), 700)

    def test_running_out_of_descriptors_is_said_once_per_second(self):
        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        http_logs.bound_http_logs()
        with self.assertLogs("sglang", "WARNING") as logs, self.assertNoLogs("asyncio", "WARNING"):
            for _ in range(20_000):
                http_logs.on_loop_error(loop, {"message": "socket.accept() out of system resource"})
        self.assertLess(len(logs.output), 10)
        logging.disable(logging.CRITICAL)
        self.addCleanup(logging.disable, logging.NOTSET)
        with mock.patch.object(loop, "default_exception_handler") as usual:
            http_logs.on_loop_error(loop, {"message": "Task exception was never retrieved"})
            usual.assert_called_once()
            # The timer that a failed accept left behind, after the listener has closed.
            late = {"message": "Exception in callback BaseSelectorEventLoop._start_serving()"}
            http_logs.on_loop_error(loop, {**late, "exception": ValueError("Invalid file descriptor: -1")})
            usual.assert_called_once()
            http_logs.on_loop_error(loop, {**late, "exception": OSError("other")})
            self.assertEqual(usual.call_count, 2)


if __name__ == "__main__":
    unittest.main()
