"""Every endpoint of the real HTTP server over a fake engine: shapes, bad input, keys, disconnects, failures."""

import asyncio
import json
import logging
import socket
import unittest

import httpx
import msgspec

from sglang.srt.entrypoints.auth import ADMIN_PATHS, AuthPolicy
from sglang.srt.entrypoints.context import ServerStatus
from sglang.srt.entrypoints.http_server import PortError, bind, listen
from sglang.srt.entrypoints.lacking import LACKING_PATHS
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq, FinishReason
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import CONTEXT_LEN, FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

JSON = {"content-type": "application/json"}


def sse(text):
    """Decoded events of a stream; the last must be [DONE]."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines), text
    assert lines[-1] == "data: [DONE]", text
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


class ServerTestCase(CustomTestCase):
    settings: dict = {}

    @classmethod
    def setUpClass(cls):
        cls.fake = FakeServer(**cls.settings).wait_ready()
        cls.client = httpx.Client(base_url=cls.fake.url, timeout=10)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.fake.stop()

    def setUp(self):
        scheduler = self.fake.scheduler
        scheduler.delay_s, scheduler.frozen, scheduler.error, scheduler.max_queued = 0.0, False, None, 10**6
        scheduler.received.clear()

    def generate(self, **body):
        return self.client.post("/generate", json=body)


class TestGenerate(ServerTestCase):
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

    def test_a_full_queue_is_503_also_for_a_stream(self):
        self.fake.scheduler.max_queued = 0
        for stream in (False, True):
            reply = self.generate(text="abc", stream=stream)
            self.assertEqual(reply.status_code, 503)
            self.assertEqual(reply.json()["error"]["message"], "The request queue is full.")
        for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": [{"role": "user"}]})):
            reply = self.client.post(f"/v1/{path}", json=body)
            self.assertEqual((reply.status_code, reply.json()["code"]), (503, 503), reply.text)


BAD_JSON = [
    b"", b"{", b"[]", b"null", b"not json", b'{"text": "a"} trailing', b'{"text": "\xff"}', b'{"text": "\\ud800"}',
    b'{"text": "a", "sampling_params": {"temperature": NaN}}', b'{"text": "a", "sampling_params": {"top_p": Infinity}}',
    b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}",
]  # fmt: skip
BAD_GENERATE = [
    {}, {"text": 1}, {"text": ""}, {"text": []}, {"text": "a", "input_ids": [1]}, {"input_ids": "1 2"},
    {"input_ids": [1.5]}, {"input_ids": [True]}, {"input_ids": []}, {"input_ids": [-1]}, {"input_ids": [10**9]},
    {"input_ids": [10**40]}, {"input_ids": [[1], 2]}, {"input_ids": [5] * CONTEXT_LEN}, {"text": "word " * 500},
    {"text": "a", "stream": "yes"}, {"text": "a", "rid": 5}, {"text": "a", "sampling_params": 3},
    {"text": "a", "sampling_params": [{}]}, {"text": ["a"], "sampling_params": [{}, {}]},
    {"text": "a", "return_logprob": "x"}, {"text": "a", "return_logprob": True, "logprob_start_len": 99},
    {"text": "a", "return_logprob": True, "top_logprobs_num": 10**9}, {"text": "a", "input_embeds": [[0.1]]},
    {"text": "a", "image_data": "x.png"}, {"text": "a", "lora_path": "x"}, {"text": "a", "return_hidden_states": True},
]  # fmt: skip
BAD_PARAMS = [
    {"temperature": -0.5}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 2}, {"top_p": -1}, {"top_k": 0},
    {"top_k": 1.5}, {"min_p": 1.5}, {"frequency_penalty": 3}, {"repetition_penalty": 0}, {"max_new_tokens": -1},
    {"max_new_tokens": "ten"}, {"min_new_tokens": 9, "max_new_tokens": 3}, {"n": 0}, {"n": 10**6}, {"stop": ""},
    {"stop": [""]}, {"stop": 5}, {"stop": ["x"] * 99}, {"stop_token_ids": [10**9]}, {"stop_token_ids": ["a"]},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"99999999": 1}}, {"sampling_seed": 2**70}, {"regex": "a*"},
    {"json_schema": "{}"}, {"stream_interval": 0},
]  # fmt: skip
BAD_COMPLETIONS = [
    {}, {"prompt": None}, {"prompt": ""}, {"prompt": []}, {"prompt": {"a": 1}}, {"prompt": ["a", 1]},
    {"prompt": [10**9]}, {"prompt": [[1], []]}, {"prompt": "a", "max_tokens": -1}, {"prompt": "a", "max_tokens": "x"},
    {"prompt": "a", "suffix": "b"}, {"prompt": "a", "logprobs": -1}, {"prompt": "a", "n": 0},
    {"prompt": "a", "temperature": -1}, {"prompt": "a", "top_p": 0}, {"prompt": "a", "top_p": 2},
    {"prompt": "a", "stop": [""]}, {"prompt": "a", "stream_options": 5}, {"prompt": "a", "cache_salt": "s"},
    {"prompt": "a", "logit_bias": {"a": 1}}, {"prompt": "word " * 500}, {"prompt": "a", "seed": "x"},
]  # fmt: skip
HI = [{"role": "user", "content": "hi"}]
BAD_CHAT = [
    {}, {"messages": "hi"}, {"messages": []}, {"messages": [5]}, {"messages": [{"content": "hi"}]},
    {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": ["hi"]}]}, {"messages": HI, "tools": [{"type": "function"}]},
    {"messages": HI, "tool_choice": "required"}, {"messages": HI, "response_format": {"type": "json_object"}},
    {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {}}}, {"messages": HI, "top_logprobs": 2},
    {"messages": HI, "logprobs": True, "top_logprobs": 21}, {"messages": HI, "max_completion_tokens": -1},
    {"messages": HI, "modalities": ["audio"]}, {"messages": HI, "chat_template_kwargs": {"messages": []}},
    {"messages": HI, "regex": "x"}, {"messages": HI, "temperature": -1}, {"messages": HI, "functions": [{}]},
    {"messages": [{"role": "user", "content": "word " * 500}]},
]  # fmt: skip


class TestBadInput(ServerTestCase):
    """Each bad request gets 400 beside a healthy one that finishes as if it were alone."""

    HEALTHY = {"text": "healthy request", "sampling_params": {"max_new_tokens": 12}}

    def check_all(self, path, bodies, flat):
        alone = self.client.post("/generate", json=self.HEALTHY).json()
        self.fake.scheduler.delay_s = 0.001

        async def main():
            async with httpx.AsyncClient(base_url=self.fake.url, timeout=10) as client:
                for body in bodies:
                    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
                    bad = client.post(path, content=content, headers=JSON)
                    healthy, refused = await asyncio.gather(client.post("/generate", json=self.HEALTHY), bad)
                    label = f"{path} {content[:120]!r}"
                    self.assertEqual(refused.status_code, 400, f"{label}: {refused.text[:300]}")
                    error = refused.json() if flat(refused) else refused.json()["error"]
                    self.assertEqual((error["object"], error["code"], error["param"]), ("error", 400, None), label)
                    self.assertIn(error["type"], ("BadRequestError", "Bad Request"), label)
                    self.assertGreater(len(error["message"]), 15, label)
                    for key in ("text", "output_ids"):
                        self.assertEqual(healthy.json()[key], alone[key], label)

        asyncio.run(main())
        self.assertEqual(self.fake.context.manager.num_in_flight, 0)

    def test_malformed_json(self):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            self.check_all(path, BAD_JSON, flat=lambda _: True)

    def test_generate(self):
        bodies = BAD_GENERATE + [{"text": "a", "sampling_params": params} for params in BAD_PARAMS]
        self.check_all("/generate", bodies, flat=lambda reply: reply.json().get("type") == "Bad Request")

    def test_completions(self):
        self.check_all("/v1/completions", BAD_COMPLETIONS, flat=lambda _: True)

    def test_chat(self):
        self.check_all("/v1/chat/completions", BAD_CHAT, flat=lambda _: True)

    def test_a_streaming_request_that_is_bad_gets_a_status_too(self):
        for path, body in (("/generate", {"text": ""}), ("/v1/completions", {"prompt": "a", "top_p": 2})):
            reply = self.client.post(path, json={**body, "stream": True})
            self.assertEqual((reply.status_code, reply.headers["content-type"]), (400, "application/json"))

    def test_over_long_prompt_says_both_numbers(self):
        message = self.client.post("/v1/completions", json={"prompt": [5] * 200}).json()["message"]
        self.assertEqual(
            message, f"The input (200 tokens) is longer than the model's context length ({CONTEXT_LEN} tokens)."
        )

    def test_wrong_content_type(self):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/abort_request", "/tokenize"):
            for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {}):
                reply = self.client.post(path, content=b'{"text": "a"}', headers=headers)
                self.assertEqual((reply.status_code, reply.json()["type"]), (400, "Bad Request"))
        good = self.client.post("/generate", content=b'{"text": "a"}', headers={"content-type": "Application/JSON; x"})
        self.assertEqual(good.status_code, 200)

    def test_no_such_path_or_method(self):
        for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)):
            reply = self.client.request(method, path)
            self.assertEqual((reply.status_code, reply.json()["code"], reply.json()["type"]), (status,) * 2 + (str(status),))
        for path in LACKING_PATHS:
            self.assertEqual(self.client.post(path).status_code, 501, path)

    def test_a_defect_of_ours_is_a_500_without_details(self):
        manager = self.fake.context.manager
        encode, manager._encode = manager._encode, None
        self.addCleanup(setattr, manager, "_encode", encode)
        logging.disable(logging.ERROR)
        self.addCleanup(logging.disable, logging.NOTSET)
        for path, body in (("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a", "stream": True})):
            reply = self.client.post(path, json=body)
            error = reply.json().get("error", reply.json())
            self.assertEqual((reply.status_code, error["type"]), (500, "InternalServerError"))
            self.assertNotIn("NoneType' object", reply.text)


class TestInformation(ServerTestCase):
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

    def test_health_is_503_when_the_engine_is_silent_or_the_server_not_up(self):
        self.fake.scheduler.frozen = True
        with envs.SGLANG_HEALTH_CHECK_TIMEOUT.override(1):
            self.assertEqual(self.client.get("/health_generate").status_code, 503)
            with envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.override(False):
                self.assertEqual(self.client.get("/health").status_code, 200)
        self.fake.scheduler.frozen = False
        for status in (ServerStatus.STARTING, ServerStatus.STOPPING):
            self.fake.context.status = status
            self.assertEqual(self.client.get("/health").status_code, 503)
        self.fake.context.status = ServerStatus.UP

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
        text = httpx.get(f"{self.fake.url}/metrics").text
        self.assertIn('sglang:num_running_reqs{model_name="tiny"', text)

    def test_tokenize_round_trip(self):
        reply = self.client.post("/tokenize", json={"prompt": "héllo 😀"}).json()
        self.assertEqual(reply["tokens"], self.fake.tokenizer.encode("héllo 😀"))
        self.assertEqual(reply["count"], len(reply["tokens"]))
        back = self.client.post("/detokenize", json={"tokens": reply["tokens"]}).json()
        self.assertEqual(back["text"], "héllo 😀")
        batch = self.client.post("/tokenize", json={"prompt": ["a", "b"], "add_special_tokens": False}).json()
        self.assertEqual(self.client.post("/detokenize", json={"tokens": batch["tokens"]}).json()["text"], ["a", "b"])
        self.assertEqual(self.client.post("/detokenize", json={"tokens": [10**12]}).status_code, 400)


class TestAdministration(ServerTestCase):
    def test_flush_cache(self):
        for method in ("GET", "POST"):
            reply = self.client.request(method, "/flush_cache")
            self.assertEqual(reply.status_code, 200)
            self.assertTrue(reply.text.startswith("Cache flushed"))
        self.fake.scheduler.delay_s = 0.03
        with self.client.stream("POST", "/generate", json={"text": "abc", "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            busy = httpx.get(f"{self.fake.url}/flush_cache")
            self.assertEqual(busy.status_code, 400)
            self.assertIn("busy", busy.text)
        self.assertEqual(httpx.get(f"{self.fake.url}/flush_cache?timeout=5").status_code, 200)
        for bad in ("x", "nan", "-1"):
            self.assertEqual(httpx.get(f"{self.fake.url}/flush_cache?timeout={bad}").status_code, 400)

    def test_abort_request(self):
        self.fake.scheduler.delay_s = 0.02
        for body in ({"rid": "jo"}, {"abort_all": True}):
            request = {"text": "abc", "rid": "job-1", "stream": True}
            with self.client.stream("POST", "/generate", json=request) as reply:
                lines = (line for line in reply.iter_lines() if line)
                next(lines)
                self.assertEqual(httpx.post(f"{self.fake.url}/abort_request", json=body).status_code, 200)
                last = json.loads(list(lines)[-2][len("data: ") :])
            self.assertEqual(last["meta_info"]["finish_reason"]["type"], "abort")
        self.assertEqual(self.client.post("/abort_request", json={}).status_code, 400)


class TestDisconnect(ServerTestCase):
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
                        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
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
                        self.fake.until(lambda: queued or not scheduler.running)
                        scheduler.running.clear()


class TestKeys(CustomTestCase):
    """Who gets in, as a table: (host, api key, admin key) and the status for no key, the api key, the admin key."""

    TABLE = [
        ("127.0.0.1", None, None, "inference", (None, None, None)),
        ("127.0.0.1", None, None, "admin", (None, None, None)),
        ("localhost", None, None, "admin", (None, None, None)),
        ("::1", None, None, "admin", (None, None, None)),
        ("127.0.0.1", "k", None, "inference", (401, None, 401)),
        ("127.0.0.1", "k", None, "admin", (401, None, 401)),
        ("127.0.0.1", None, "a", "inference", (None, None, None)),
        ("127.0.0.1", None, "a", "admin", (401, 401, None)),
        ("127.0.0.1", "k", "a", "inference", (401, None, 401)),
        ("127.0.0.1", "k", "a", "admin", (401, 401, None)),
        ("0.0.0.0", None, None, "inference", (None, None, None)),
        ("0.0.0.0", None, None, "admin", (403, 403, 403)),
        ("10.1.2.3", None, None, "admin", (403, 403, 403)),
        ("::", None, None, "admin", (403, 403, 403)),
        ("example.org", None, None, "admin", (403, 403, 403)),
        ("0.0.0.0", "k", None, "admin", (401, None, 401)),
        ("0.0.0.0", None, "a", "admin", (401, 401, None)),
    ]

    def status(self, policy, path, key, method="POST"):
        refusal = policy.refusal(method, path, f"Bearer {key}" if key else "")
        return refusal and refusal.status_code

    def test_table(self):
        for host, api, admin, kind, expected in self.TABLE:
            policy = AuthPolicy(host, api, admin)
            for path in ADMIN_PATHS if kind == "admin" else ("/generate", "/v1/models", "/server_info"):
                got = tuple(self.status(policy, path, key) for key in (None, "k", "a"))
                self.assertEqual(got, expected, (host, api, admin, path))

    def test_probes_are_open_and_keys_are_exact(self):
        policy = AuthPolicy("0.0.0.0", "k", "a")
        for path in ("/health", "/health_generate", "/ready", "/metrics"):
            self.assertIsNone(self.status(policy, path, None, "GET"))
        self.assertIsNone(self.status(policy, "/generate", None, "OPTIONS"))
        for header in ("k", "Bearer", "Bearer kk", "Basic k", "Bearer \u00e9", "bearer  "):
            self.assertEqual(policy.refusal("POST", "/generate", header).status_code, 401, header)
        self.assertIsNone(policy.refusal("POST", "/generate", "bearer k"))
        self.assertEqual(self.status(policy, "/flush_cache/", "k"), 401)

    def test_over_http(self):
        fake = FakeServer(host="0.0.0.0").wait_ready()
        self.addCleanup(fake.stop)
        self.assertEqual(httpx.post(f"{fake.url}/generate", json={"text": "a"}).status_code, 200)
        closed = httpx.post(f"{fake.url}/flush_cache")
        self.assertEqual(closed.status_code, 403)
        self.assertIn("--api-key", closed.json()["error"])
        self.assertEqual(httpx.get(f"{fake.url}/health").status_code, 200)

    def test_401_over_http(self):
        fake = FakeServer(api_key="k").wait_ready()
        self.addCleanup(fake.stop)
        refused = httpx.post(f"{fake.url}/generate", json={"text": "a"})
        self.assertEqual((refused.status_code, refused.json()), (401, {"error": "Unauthorized"}))
        headers = {"authorization": "Bearer k"}
        self.assertEqual(httpx.post(f"{fake.url}/generate", json={"text": "a"}, headers=headers).status_code, 200)


class TestEndOfServer(CustomTestCase):
    def test_a_dead_child_fails_requests_and_ends_the_server(self):
        fake = FakeServer().wait_ready()
        fake.scheduler.frozen = True

        async def main():
            async with httpx.AsyncClient(base_url=fake.url, timeout=10) as client:
                task = asyncio.create_task(client.post("/generate", json={"text": "abc"}))
                await asyncio.sleep(0.1)
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
            async with httpx.AsyncClient(base_url=fake.url, timeout=10) as client:
                body = {"text": "abc", "sampling_params": {"max_new_tokens": 40}}
                task = asyncio.create_task(client.post("/generate", json=body))
                await asyncio.sleep(0.1)
                fake.server.handle_exit(15, None)
                return await task

        reply = asyncio.run(main())
        self.assertEqual((reply.status_code, len(reply.json()["output_ids"])), (200, 40))
        self.assertEqual(fake.join(), 0)
        fake.stop()

    def test_a_failing_warm_up_ends_the_server(self):
        fake = FakeServer()
        fake.engine.scheduler.error = FinishReason(type="abort", message="no", status_code=500)
        if fake.context.status is not ServerStatus.UP:
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
