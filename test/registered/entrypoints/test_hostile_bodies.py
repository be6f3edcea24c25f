"""Hostile bodies: refused early, in flat memory, while a stream continues as if it were alone."""

import asyncio
import resource
import socket
import time
import unittest
from unittest import mock
from urllib.parse import urlsplit

import httpx
import msgspec

from sglang.srt.entrypoints import body_limit
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer, FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

JSON = {"content-type": "application/json"}
# What a refusal may add to the memory of this process, in which client and server both run.
MAX_GROWTH_MB = 100


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class HostileBodies(FakeServerTestCase):
    """Not a test itself: how one body is sent next to a healthy stream."""

    HEALTHY = {"text": "healthy", "stream": True, "sampling_params": {"max_new_tokens": 100}}

    def beside_a_stream(self, send):
        """What ``send(client)`` returns, after a check that the stream's events equal those of a quiet server."""

        async def stream(client):
            async with client.stream("POST", "/generate", json=self.HEALTHY) as reply:
                lines = [line async for line in reply.aiter_lines() if line.startswith("data: {")]
            return [msgspec.json.decode(line[6:])["text"] for line in lines]

        async def both():
            async with httpx.AsyncClient(base_url=self.fake.url, timeout=60) as client:
                alone = await stream(client)
                self.fake.scheduler.delay_s = 0.005
                texts, result = await asyncio.gather(stream(client), send(client))
                self.assertEqual(texts[-1], alone[-1])
                return result

        return asyncio.run(both())


class TestHostileBodies(HostileBodies):
    settings = {"max_request_bytes": 64 << 20}

    def test_20_mb_of_text(self):
        text = "a" * (20 << 20)
        for path, body in (
            ("/generate", {"text": text}),
            ("/v1/completions", {"prompt": text}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            ("/tokenize", {"prompt": text}),
        ):
            content = msgspec.json.encode(body)
            before = peak_mb()
            reply = self.beside_a_stream(lambda client: client.post(path, content=content, headers=JSON))  # noqa: B023
            self.assertEqual(reply.status_code, 400, path)
            self.assertIn("send at most 1536 characters", reply.text)
            self.assertLess(peak_mb() - before, MAX_GROWTH_MB, path)
        self.assertEqual(self.fake.context.manager.num_in_flight, 0)


class TestAmplifiers(HostileBodies):
    """Small bodies that request much: refused by name, with little CPU time, in flat memory."""

    settings = {"max_request_bytes": 64 << 20}

    # Path, body, what the refusal names. The third row is 15 MB, the stops 32 MB, the rest below 5 MB.
    ROWS = (
        ("/v1/completions", {"prompt": [[1]] * 20_000, "n": 1024}, "20480000 answers"),
        ("/generate", {"input_ids": [[1]] * 200, "sampling_params": {"n": 1024}}, "204800 answers"),
        ("/detokenize", {"tokens": [12] * 5_000_000}, "more than 262144 items"),
        ("/generate", {"text": "a", "sampling_params": {"stop": ["x" * (1 << 20)] * 32}}, "stop strings have at most"),
        ("/v1/completions", {"prompt": "a", "stop": "x" * (4 << 20)}, "stop strings have at most"),
        ("/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 288}, "top_logprobs_num must be"),
        ("/v1/chat/completions", {"messages": [], "logprobs": True, "top_logprobs": 288}, "top_logprobs must be"),
        ("/generate", {"text": "a", "token_ids_logprob": list(range(1_000_000))}, "token_ids_logprob takes at most"),
        ("/generate", {"text": "a", "sampling_params": {"stop_token_ids": list(range(10**6))}}, "stop_token_ids takes"),
        ("/generate", {"text": "a", "rid": "x" * (5 << 20)}, "length <= 256"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(300_000)}}, "logit_bias takes"),
        ("/v1/completions", {"prompt": "a", "regex": "x" * (5 << 20)}, "regex has at most"),
    )

    def test_rows(self):
        for path, body, pattern in self.ROWS:
            content = msgspec.json.encode(body)
            for stream in (b"", b'"stream":true,') if path != "/detokenize" else (b"",):
                self.check_refused(path, content[:1] + stream + content[1:], 400, pattern)
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = {"model": "m" * (5 << 20), "prompt": "a"} if "chat" not in path else {"model": "m" * (5 << 20)}
            body |= {"messages": []} if "chat" in path else {}
            self.check_refused(path, msgspec.json.encode(body), 404, "does not exist")
        self.assertEqual(self.fake.context.manager.num_in_flight, 0)

    def check_refused(self, path, content, status, pattern):
        before, spent = peak_mb(), 0.0

        async def send(client):
            nonlocal spent
            began = time.process_time()
            reply = await client.post(path, content=content, headers=JSON)
            spent = time.process_time() - began
            return reply

        reply = self.beside_a_stream(send)
        label = f"{path} {pattern}"
        self.assertEqual((reply.status_code, pattern in reply.text), (status, True), f"{label}: {reply.text[:200]}")
        self.assertLess(len(reply.content), 2000, label)
        # Client, server and the stream next to it together.
        self.assertLess(spent, 1.0, label)
        self.assertLess(peak_mb() - before, MAX_GROWTH_MB, label)

    def test_equal_ids_count_once(self):
        body = {"text": "a", "return_logprob": True, "token_ids_logprob": [5] * 1_000_000}
        content = msgspec.json.encode({**body, "sampling_params": {"max_new_tokens": 5}})
        before = peak_mb()
        reply = self.beside_a_stream(lambda client: client.post("/generate", content=content, headers=JSON))
        self.assertEqual(reply.status_code, 200)
        self.assertEqual(len(reply.json()["meta_info"]["output_token_ids_logprobs"][0]), 1)
        self.assertLess(peak_mb() - before, MAX_GROWTH_MB)

    def test_many_unknown_fields(self):
        fields = msgspec.json.encode({f"field{i}": i for i in range(300_000)})
        content = b'{"prompt":"a","max_tokens":1,"return_warnings":true,' + fields[1:]
        before = peak_mb()
        with self.assertLogs("sglang.srt.managers.request_fields", "WARNING"):
            reply = self.beside_a_stream(lambda client: client.post("/v1/completions", content=content, headers=JSON))
        self.assertEqual((reply.status_code, len(reply.json()["warnings"])), (200, 16))
        self.assertLess(peak_mb() - before, MAX_GROWTH_MB)


class TestLargeBodies(HostileBodies):
    def test_1_gib_in_chunks_is_refused_in_flat_memory(self):
        async def chunks(count):
            for _ in range(count):
                yield b" " * (1 << 20)

        for path, mib in (("/generate", 1024), ("/v1/chat/completions", 200), ("/abort_request", 200)):
            before = peak_mb()

            async def send(client):
                return await client.post(path, content=chunks(mib), headers=JSON)  # noqa: B023

            reply = self.beside_a_stream(send)
            self.assertEqual(reply.status_code, 413, path)
            self.assertIn("--max-request-bytes", reply.json()["message"])
            self.assertLess(peak_mb() - before, MAX_GROWTH_MB, path)

    def test_a_declared_length_is_refused_before_a_byte_is_read(self):
        for path in ("/generate", "/health", "/no/such/path"):
            with socket.create_connection((urlsplit(self.fake.url).hostname, urlsplit(self.fake.url).port), 10) as raw:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                raw.sendall(f"{head}Content-Length: {(16 << 20) + 1}\r\n\r\n".encode())
                answer = b""
                while chunk := raw.recv(65536):  # to the end: the server closes
                    answer += chunk
            self.assertTrue(answer.startswith(b"HTTP/1.1 413 "), answer)

    def test_a_body_of_exactly_the_limit_is_read(self):
        body = b'{"prompt": "a"' + b" " * ((16 << 20) - 15) + b"}"
        self.assertEqual(self.client.post("/tokenize", content=body, headers=JSON).status_code, 200)
        self.assertEqual(self.client.post("/tokenize", content=body + b" ", headers=JSON).status_code, 413)


class TestBodiesTogether(CustomTestCase):
    def test_unfinished_bodies_share_a_bound(self):
        with mock.patch.object(body_limit, "MAX_BODY_BYTES_IN_FLIGHT", 0):
            fake = FakeServer(max_request_bytes=100_000).wait_ready()
        self.addCleanup(fake.stop)
        fake.scheduler.frozen = True
        body = msgspec.json.encode({"text": "a", "pad": "x" * 70_000})

        async def main():
            async with httpx.AsyncClient(base_url=fake.url, timeout=60, headers=JSON) as client:
                held = [asyncio.create_task(client.post("/generate", content=body)) for _ in range(2)]
                while fake.context.manager.num_in_flight < 2:
                    await asyncio.sleep(0.01)
                third = await client.post("/generate", content=body)
                self.assertEqual((third.status_code, third.headers["retry-after"]), (503, "1"))
                for task in held:
                    task.cancel()
                await asyncio.gather(*held, return_exceptions=True)
                while fake.context.manager.num_in_flight:
                    await asyncio.sleep(0.01)
                self.assertEqual((await client.post("/tokenize", content=b'{"prompt": "a"}')).status_code, 200)

        asyncio.run(main())


class TestKeysFirst(CustomTestCase):
    def test_who_has_no_key_gets_no_body_read(self):
        fake = FakeServer(api_key="k").wait_ready()
        self.addCleanup(fake.stop)
        with socket.create_connection((urlsplit(fake.url).hostname, urlsplit(fake.url).port), 10) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n")
            self.assertTrue(raw.recv(65536).startswith(b"HTTP/1.1 401 "))


if __name__ == "__main__":
    unittest.main()
