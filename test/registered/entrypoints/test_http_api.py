"""Every endpoint of the real HTTP server over a fake engine: shapes, disconnects, failures."""

import asyncio
import json
import socket
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import httpx
import torch

from sglang.srt.entrypoints.context import ServerStatus
from sglang.srt.environ import envs
from sglang.srt.layers.moe.token_dispatcher.recv_stats import RecvStats
from sglang.srt.managers import prompt_text
from sglang.srt.managers.io_struct import AbortReq, FinishReason, FlushCacheReqInput, GetInternalStateReq, StartedReqs
from sglang.srt.utils.network import PortError, bind, listen
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import CONTEXT_LEN, FakeServer, FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "hi"}]


def sse(text):
    """Decoded events of a stream; the last must be [DONE]."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines), text
    assert lines[-1] == "data: [DONE]", text
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


class TestLongTexts(FakeServerTestCase):
    def test_every_endpoint_tokenizes_them_beside_the_loop(self):
        tokenizer, threads = self.fake.tokenizer, []
        encode = tokenizer.encode

        def spy(*args, **kwargs):
            threads.append(threading.current_thread())
            return encode(*args, **kwargs)

        long = "word " * 90
        with mock.patch.object(tokenizer, "encode", spy), mock.patch.object(prompt_text, "_LONG_TEXT_CHARS", 400):
            bodies = {
                "/generate": {"text": long},
                "/v1/completions": {"prompt": long},
                "/v1/chat/completions": {"messages": [{"role": "user", "content": long}]},
                "/tokenize": {"prompt": [long]},
            }
            for path, body in bodies.items():
                reply = self.client.post(path, json=body)
                self.assertEqual(reply.status_code, 200 if path == "/tokenize" else 400, reply.text)
        self.assertEqual(len(threads), len(bodies))
        self.assertNotIn(self.fake._thread, threads)


class TestGenerate(FakeServerTestCase):
    def test_post_and_put(self):
        for method in ("POST", "PUT"):
            body = {"text": "hello", "sampling_params": {"max_new_tokens": 4}, "rid": "mine"}
            reply = self.client.request(method, "/generate", json=body)
            self.assertEqual(reply.status_code, 200, reply.text)
            result = reply.json()
            self.assertEqual(set(result), {"text", "output_ids", "meta_info"})
            self.assertEqual(result["meta_info"]["id"], "mine")
            self.assertEqual(result["meta_info"]["finish_reason"], {"type": "length", "length": 4})

    def test_keys_that_a_router_adds_are_ignored(self):
        extra = {"model": None, "log_metrics": True, "no_logs": False, "background": None, "return_bytes": False}
        extra |= {"bootstrap_host": None, "bootstrap_port": None, "bootstrap_room": None, "data_parallel_rank": 0}
        extra |= {"priority": 3, "some_future_key": {"a": 1}, "sampling_params": {"max_new_tokens": 1, "unknown": 1}}
        extra |= {"return_hidden_states": False, "lora_path": None, "session_params": None, "return_entropy": False}
        self.assertEqual(self.generate(text="a", **extra).status_code, 200)

    def test_batch_is_a_list_in_order(self):
        results = self.generate(text=["ab", "cd"], sampling_params={"max_new_tokens": 3}).json()
        self.assertEqual([r["text"] for r in results], [self.generate(text=t, sampling_params={"max_new_tokens": 3})
                                                        .json()["text"] for t in ("ab", "cd")])  # fmt: skip

    def test_stream_is_cumulative(self):
        self.fake.scheduler.delay_s = 0.002
        params = {"max_new_tokens": 12}
        reply = self.generate(text="hello world", sampling_params=params, stream=True)
        self.assertTrue(reply.headers["content-type"].startswith("text/event-stream"))
        events = sse(reply.text)
        whole = self.generate(text="hello world", sampling_params=params).json()
        self.assertEqual(events[-1]["text"], whole["text"])
        self.assertGreater(len(events), 2)
        for earlier, later in zip(events, events[1:]):
            self.assertTrue(later["text"].startswith(earlier["text"]))
        batch = sse(self.generate(text=["ab", "cd"], sampling_params={"n": 2, "max_new_tokens": 2}, stream=True).text)
        self.assertEqual({e["index"] for e in batch}, {0, 1, 2, 3})

    def test_logprobs_are_triples(self):
        body = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [7]}
        meta = self.generate(text="ab", sampling_params={"max_new_tokens": 2}, **body).json()["meta_info"]
        self.assertIsNone(meta["input_token_logprobs"][0][0])
        self.assertEqual([len(e) for e in meta["output_token_logprobs"]], [3, 3])
        self.assertIsNone(meta["output_token_logprobs"][0][2])
        for key in ("input_top_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
            self.assertEqual(len(meta[key]), 2 if "output" in key else meta["prompt_tokens"], key)

    def test_error_in_mid_stream_is_an_event(self):
        self.fake.scheduler.delay_s = 0.05
        with self.client.stream("POST", "/generate", json={"text": "abc", "stream": True}) as reply:
            lines = (line for line in reply.iter_lines() if line)
            first = next(lines)
            self.fake.scheduler.error = FinishReason(type="abort", message="boom", status_code=500)
            rest = list(lines)
        self.assertEqual(reply.status_code, 200)
        self.assertIn('"text"', first)
        error = json.loads(rest[-2][len("data: ") :])["error"]
        self.assertEqual((error["message"], error["code"]), ("boom", 500))
        self.assertEqual(rest[-1], "data: [DONE]")


class TestInformation(FakeServerTestCase):
    settings = {"api_key": "secret", "served_model_name": "tiny", "enable_metrics": True}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.client.headers["authorization"] = "Bearer secret"

    def test_health(self):
        for path in ("/health", "/health_generate", "/ping", "/ready"):
            reply = self.client.get(path)
            self.assertEqual((reply.status_code, reply.content), (200, b""), path)
        self.assertTrue(any(getattr(m, "rid", "").startswith("HEALTH_CHECK") for m in self.fake.scheduler.received))

    def test_many_short_lists_to_detokenize_let_others_in(self):
        decoded = threading.Event()

        def slow(ids, _):
            decoded.set()
            time.sleep(0.001)
            return "a"

        with mock.patch.object(self.fake.tokenizer, "decode", slow), ThreadPoolExecutor(1) as pool:
            call = pool.submit(self.client.post, "/detokenize", json={"tokens": [[5]] * 4096})
            self.assertTrue(decoded.wait(60))
            self.assertEqual(self.client.get("/v1/models").status_code, 200)
            self.assertFalse(call.done())
            self.assertEqual(call.result().json()["text"], ["a"] * 4096)
        reply = self.client.post("/detokenize", json={"tokens": [[5]] * 4097})
        self.assertEqual(reply.status_code, 400)
        self.assertIn("more than 4096 lists", reply.text)

    def test_health_tells_of_a_process_that_makes_no_progress(self):
        self.fake.engine.stall = "scheduler (pid 5) has made no progress for 7 s"
        self.addCleanup(setattr, self.fake.engine, "stall", None)
        with self.assertLogs("sglang.srt.entrypoints.http_server", "WARNING") as logs:
            self.fake.until(lambda: self.client.get("/health").status_code == 503)
            for path in ("/health", "/ready", "/health_generate"):
                reply = self.client.get(path)
                self.assertEqual((reply.status_code, reply.text), (503, "stalled"))
            time.sleep(1.2)
        self.assertEqual(len(logs.output), 1)
        self.assertEqual(self.generate(text="a").status_code, 200)  # it may continue
        self.fake.engine.stall = None
        self.fake.until(lambda: self.client.get("/health").status_code == 200)

    def test_health_is_503_when_the_engine_is_silent_or_the_server_not_up(self):
        self.fake.scheduler.frozen = True
        with envs.SGLANG_HEALTH_CHECK_TIMEOUT.override(1):
            # The last word of an earlier test's request may still arrive, and it counts as a sign of life.
            self.fake.until(lambda: self.client.get("/health_generate").status_code == 503)
            with envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.override(False):
                self.assertEqual(self.client.get("/health").status_code, 200)
        self.fake.scheduler.frozen = False
        for status in (ServerStatus.STARTING, ServerStatus.STOPPING):
            self.fake.context.status = status
            self.assertEqual(self.client.get("/health").status_code, 503)
        self.fake.context.status = ServerStatus.UP

    def test_a_busy_server_that_sends_nothing_is_healthy(self):
        """Answers without a stream fill the server, and the probe waits for the end of one."""
        scheduler = self.fake.scheduler
        enqueue = scheduler._enqueue

        def full(message):
            if message.rid.startswith("HEALTH_CHECK"):
                scheduler._to_tokenizer.send(StartedReqs(rids=[message.rid]))
            else:
                enqueue(message)

        with envs.SGLANG_HEALTH_CHECK_TIMEOUT.override(1), mock.patch.object(scheduler, "_enqueue", full):
            reply = self.client.get("/health_generate")  # started, and no step has run
            self.assertEqual(reply.status_code, 503)
            scheduler.delay_s = 0.02
            self.addCleanup(setattr, scheduler, "delay_s", 0.0)
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(self.generate, text="a", sampling_params={"max_new_tokens": 100, "ignore_eos": True})
                self.fake.until(lambda: scheduler.running)
                self.assertEqual(self.client.get("/health_generate").status_code, 200)
                asked = [message for message in scheduler.received if isinstance(message, GetInternalStateReq)]
                # Else it would wait for the device, and reset what /metrics says of experts.
                self.assertTrue(asked and asked[-1].brief)
                self.assertFalse(call.done())
                self.assertEqual(call.result().status_code, 200)

    def test_model_info(self):
        for path in ("/model_info", "/get_model_info"):
            info = self.client.get(path).json()
            self.assertEqual((info["architectures"], info["model_type"]), (["FakeForCausalLM"], "fake"))
            self.assertTrue(info["is_generation"])

    def test_server_info(self):
        with envs.SGLANG_HEALTH_CHECK_TIMEOUT.override(9):
            info = self.client.get("/server_info").json()
        self.assertEqual(info["api_key"], "<redacted>")
        self.assertNotIn("secret", json.dumps(info))
        self.assertEqual(info["served_model_name"], "tiny")
        self.assertEqual(info["max_total_num_tokens"], 4096)
        self.assertEqual(info["internal_states"][0]["num_running_reqs"], 0)
        self.assertEqual(info["env"]["SGLANG_HEALTH_CHECK_TIMEOUT"], "9")
        for key in ("version", "kernels", "fakes", "tp_size", "page_size"):
            self.assertIn(key, info)
        self.assertEqual(self.client.get("/get_server_info").status_code, 200)

    def test_models(self):
        (card,) = self.client.get("/v1/models").json()["data"]
        self.assertEqual((card["id"], card["max_model_len"], card["owned_by"]), ("tiny", CONTEXT_LEN, "sglang"))
        self.assertEqual(self.client.get("/v1/models/tiny").json()["id"], "tiny")
        missing = self.client.get("/v1/models/org/other")
        self.assertEqual((missing.status_code, missing.json()["error"]["code"]), (404, "model_not_found"))

    def test_load_and_metrics(self):
        self.assertEqual(self.client.get("/get_load").json()[0]["num_reqs"], 0)
        self.assertEqual(self.client.get("/v1/loads").json()["loads"][0]["token_usage"], 0)
        text = httpx.get(f"{self.fake.url}/metrics", timeout=60).text
        self.assertRegex(text, 'sglang:num_running_reqs{.*model_name="tiny"')
        self.assertNotIn("sglang:moe_", text)

    def test_metrics_of_the_receive_buffers(self):
        recv_stats = RecvStats(capacity=64, device=torch.device("cpu"))
        recv_stats.record_step(32, 2)
        recv_stats.record_dispatch(torch.tensor([20], dtype=torch.int32), 40)
        recv_stats.record_raised_limit()
        with mock.patch.object(self.fake.scheduler, "experts", {"received_rows": recv_stats.snapshot()}):
            text = httpx.get(f"{self.fake.url}/metrics", timeout=60).text
        found = {line.split("{")[0]: line.split()[-1] for line in text.splitlines() if line.startswith("sglang:moe_")}
        wanted = {
            "recv_rows": 20,
            "recv_rows_peak": 20,
            "recv_rows_bound": 40,
            "recv_buffer_rows": 64,
            "recv_suggested_cap": 32,
            "rounds_max": 2,
            "input_limit_raised_total": 1,
        }
        self.assertEqual(found, {f"sglang:moe_{name}": str(float(value)) for name, value in wanted.items()})
        self.assertIn("# TYPE sglang:moe_input_limit_raised_total counter", text)

    def test_tokenize_round_trip(self):
        reply = self.client.post("/tokenize", json={"prompt": "héllo 😀"}).json()
        self.assertEqual(reply["tokens"], self.fake.tokenizer.encode("héllo 😀"))
        self.assertEqual(reply["count"], len(reply["tokens"]))
        back = self.client.post("/detokenize", json={"tokens": reply["tokens"]}).json()
        self.assertEqual(back["text"], "héllo 😀")
        batch = self.client.post("/tokenize", json={"prompt": ["a", "b"], "add_special_tokens": False}).json()
        self.assertEqual(self.client.post("/detokenize", json={"tokens": batch["tokens"]}).json()["text"], ["a", "b"])
        self.assertEqual(self.client.post("/detokenize", json={"tokens": [10**12]}).status_code, 400)


class TestAdministration(FakeServerTestCase):
    def test_flush_cache(self):
        for method in ("GET", "POST"):
            reply = self.client.request(method, "/flush_cache")
            self.assertEqual(reply.status_code, 200)
            self.assertTrue(reply.text.startswith("Cache flushed"))
        self.fake.scheduler.delay_s = 0.03
        with self.client.stream("POST", "/generate", json={"text": "abc", "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            busy = httpx.get(f"{self.fake.url}/flush_cache", timeout=60)
            self.assertEqual(busy.status_code, 400)
            self.assertIn("busy", busy.text)
        self.assertEqual(httpx.get(f"{self.fake.url}/flush_cache?timeout=60").status_code, 200)
        for bad in ("x", "nan", "-1"):
            self.assertEqual(httpx.get(f"{self.fake.url}/flush_cache?timeout={bad}").status_code, 400)

    def test_waiting_for_a_flush_asks_nothing_and_ends_with_its_client(self):
        manager, scheduler = self.fake.context.manager, self.fake.scheduler
        scheduler.frozen = True
        self.addCleanup(setattr, scheduler, "frozen", False)
        waiting = []
        flush = manager.flush_cache

        async def counted(timeout_s):
            waiting.append(timeout_s)
            try:
                return await flush(timeout_s)
            finally:
                waiting.remove(timeout_s)

        async def main():
            async with httpx.AsyncClient(base_url=self.fake.url, timeout=10) as client:
                busy = asyncio.create_task(client.post("/generate", json={"text": "abc"}))
                await asyncio.to_thread(self.fake.until, lambda: manager.num_in_flight)
                flushes = [asyncio.create_task(client.post("/flush_cache?timeout=60")) for _ in range(20)]
                await asyncio.to_thread(self.fake.until, lambda: len(waiting) == 20)
                await asyncio.sleep(0.3)
                for task in flushes:
                    task.cancel()
                await asyncio.to_thread(self.fake.until, lambda: not waiting)
                busy.cancel()

        with mock.patch.object(manager, "flush_cache", counted):
            asyncio.run(main())
        self.assertFalse([m for m in scheduler.received if isinstance(m, FlushCacheReqInput)])

    def test_abort_request(self):
        self.fake.scheduler.delay_s = 0.02
        for body in ({"rid": "jo"}, {"abort_all": True}):
            request = {"text": "abc", "rid": "job-1", "stream": True}
            with self.client.stream("POST", "/generate", json=request) as reply:
                lines = (line for line in reply.iter_lines() if line)
                next(lines)
                self.assertEqual(httpx.post(f"{self.fake.url}/abort_request", json=body, timeout=60).status_code, 200)
                last = json.loads(list(lines)[-2][len("data: ") :])
            self.assertEqual(last["meta_info"]["finish_reason"]["type"], "abort")
        self.assertEqual(self.client.post("/abort_request", json={}).status_code, 400)


class TestDisconnect(FakeServerTestCase):
    BODIES = (
        ("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 100}}),
        ("/generate", {"text": ["abc", "de"], "sampling_params": {"max_new_tokens": 100, "n": 2}}),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 100}),
        ("/v1/chat/completions", {"messages": HI}),
    )

    def test_at_every_stage(self):
        """Before any output (queued) and while decoding, with and without a stream: every request is aborted."""
        scheduler = self.fake.scheduler
        for stream in (False, True):
            for queued in (False, True):
                for path, body in self.BODIES:
                    with self.subTest(path, stream=stream, queued=queued):
                        self.setUp()
                        scheduler.delay_s = 0.02
                        scheduler.script = (lambda _: [9] * 100) if not queued else scheduler.script
                        content = json.dumps({**body, "stream": stream}).encode()
                        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        connection = socket.create_connection(("127.0.0.1", int(self.fake.url.rsplit(":")[-1])))
                        if queued:
                            scheduler.frozen = True
                        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
                        if queued:
                            self.fake.until(lambda: scheduler.received)
                        elif stream:
                            self.assertIn(b"200 OK", connection.recv(1000))
                        else:
                            self.fake.until(lambda: scheduler.running)
                        connection.close()
                        self.fake.until(lambda: any(isinstance(m, AbortReq) for m in scheduler.received))
                        self.fake.until(lambda: self.fake.context.manager.num_in_flight == 0)
                        sent = {m.rid for m in scheduler.received if not isinstance(m, AbortReq)}
                        self.fake.until(lambda rids=sent: rids == set(scheduler.aborted_rids()))
                        scheduler.frozen = False
                        if not queued:
                            self.fake.until(lambda: not scheduler.running)
                        scheduler.running.clear()


class TestEndOfServer(CustomTestCase):
    def test_a_dead_child_fails_requests_and_ends_the_server(self):
        fake = FakeServer().wait_ready()
        fake.scheduler.frozen = True

        async def main():
            async with httpx.AsyncClient(base_url=fake.url, timeout=60) as client:
                task = asyncio.create_task(client.post("/generate", json={"text": "abc"}))
                await asyncio.to_thread(fake.until, lambda: fake.scheduler.received)
                fake.engine.dead = "scheduler (pid 1) ended with exit code -9"
                return await task

        reply = asyncio.run(main())
        self.assertEqual(reply.status_code, 500)
        self.assertIn("scheduler (pid 1) ended", reply.json()["error"]["message"])
        self.assertEqual(fake.join(), 1)
        fake.stop()

    def test_a_stop_lets_short_requests_finish(self):
        fake = FakeServer().wait_ready()
        fake.scheduler.delay_s = 0.01

        async def main():
            async with httpx.AsyncClient(base_url=fake.url, timeout=60) as client:
                body = {"text": "abc", "sampling_params": {"max_new_tokens": 40}}
                task = asyncio.create_task(client.post("/generate", json=body))
                await asyncio.to_thread(fake.until, lambda: fake.scheduler.running)
                fake.server.handle_exit(15, None)
                return await task

        reply = asyncio.run(main())
        self.assertEqual((reply.status_code, len(reply.json()["output_ids"])), (200, 40))
        self.assertEqual(fake.join(), 0)
        fake.stop()

    def test_a_failing_warm_up_ends_the_server(self):
        fake = FakeServer(error=FinishReason(type="abort", message="no", status_code=500))
        self.assertEqual(fake.join(), 1)
        fake.stop()

    def test_port_in_use(self):
        with bind("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            with bind("127.0.0.1", port) as second:
                listen(first)
                with self.assertRaisesRegex(PortError, f"port {port}.*--port"):
                    listen(second)
            with self.assertRaisesRegex(PortError, f"Cannot listen on 127.0.0.1 port {port}"):
                bind("127.0.0.1", port)
        with self.assertRaisesRegex(PortError, "no-such-host.invalid"):
            bind("no-such-host.invalid", 30000)


if __name__ == "__main__":
    unittest.main()
