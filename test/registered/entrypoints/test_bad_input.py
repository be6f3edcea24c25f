"""Replies of the real HTTP server over a fake engine to bad requests, while good ones run."""

import asyncio
import gzip
import logging
import unittest
from unittest import mock

import httpx
import msgspec

from sglang.srt.entrypoints.unsupported import UNSUPPORTED_PATHS
from sglang.srt.managers import request_input
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import CONTEXT_LEN, FakeServerTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

JSON = {"content-type": "application/json"}
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
    {"temperature": -0.5}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 2}, {"top_p": -1}, {"top_k": -2},
    {"top_k": 1.5}, {"min_p": 1.5}, {"frequency_penalty": 3}, {"repetition_penalty": 0}, {"max_new_tokens": -1},
    {"max_new_tokens": "ten"}, {"min_new_tokens": 9, "max_new_tokens": 3}, {"n": 0}, {"n": 10**6}, {"stop": ""},
    {"stop": [""]}, {"stop": 5}, {"stop": ["x"] * 99}, {"stop_token_ids": [10**9]}, {"stop_token_ids": ["a"]},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"99999999": 1}}, {"sampling_seed": 2**70}, {"regex": "(a"},
    {"json_schema": "{"}, {"regex": "a", "ebnf": "b"}, {"stream_interval": 0}, {"logit_bias": {"5": 1e300}},
    {"top_p": 1e-300}, {"temperature": 1e300}, {"repetition_penalty": 1e-300},
]  # fmt: skip
# Each of these is small, or cheap to send, and would cost much for each token or each answer.
AMPLIFIERS = [
    {"sampling_params": {"stop": ["x" * 1025]}}, {"sampling_params": {"stop": ["x" * 1000] * 9}},
    {"sampling_params": {"stop_token_ids": list(range(1025))}},
    {"sampling_params": {"logit_bias": {str(i): 1 for i in range(1025)}}},
    {"return_logprob": True, "token_ids_logprob": list(range(1025))},
    {"return_logprob": True, "top_logprobs_num": 129}, {"rid": "x" * 257}, {"text": ["a"], "rid": ["x" * 257]},
    {"sampling_params": {"n": 1025}}, {"text": ["a"] * 9, "sampling_params": {"n": 1000}},
    {"text": ["a"] * 3, "sampling_params": [{"n": 1000}] * 3}, {"text": ["a"] * 8193},
    {"text": ["a"] * 2, "sampling_params": {"n": 1024.0}, "return_logprob": True, "logprob_start_len": -1,
     "top_logprobs_num": 4, "token_ids_logprob": [1] * 4000, "regex": "x"},
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
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user", "content": ["hi"]}]}, {"messages": HI, "tools": [{"type": "function"}]},
    {"messages": HI, "tool_choice": "required"}, {"messages": HI, "response_format": {"type": "xml"}},
    {"messages": HI, "response_format": {"type": "json_object"}, "regex": "a"}, {"messages": HI, "guided_choice": []},
    {"messages": HI, "structured_outputs": {"regex": "a", "json": {}}},
    {"messages": HI, "structural_tag": {"triggers": ["<a"], "structures": [{"begin": "b", "end": ""}]}},
    {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {}}},
    {"messages": HI, "top_logprobs": 2},
    {"messages": HI, "logprobs": True, "top_logprobs": 21}, {"messages": HI, "max_completion_tokens": -1},
    {"messages": HI, "modalities": ["audio"]}, {"messages": HI, "chat_template_kwargs": {"messages": []}},
    {"messages": HI, "regex": "(?=x)"}, {"messages": HI, "temperature": -1}, {"messages": HI, "functions": [{}]},
    {"messages": [{"role": "user", "content": "word " * 500}]},
    {"messages": HI, "chat_template_kwargs": {"self": 1}}, {"messages": HI, "chat_template_kwargs": {"range": 1}},
    {"messages": HI, "chat_template_kwargs": {"continue_final_message": 1}},
    {"messages": [{"role": "System", "content": "hi"}, *HI]}, {"messages": [{"role": "", "content": "hi"}, *HI]},
    {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
]  # fmt: skip


class TestBadInput(FakeServerTestCase):
    """Each bad request gets 400 next to a healthy one that finishes as if it were alone."""

    HEALTHY = {"text": "healthy request", "sampling_params": {"max_new_tokens": 12}}

    def check_all(self, path, bodies):
        alone = self.client.post("/generate", json=self.HEALTHY).json()
        self.fake.scheduler.delay_s = 0.001

        async def main():
            async with httpx.AsyncClient(base_url=self.fake.url, timeout=60) as client:
                for body in bodies:
                    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
                    bad = client.post(path, content=content, headers=JSON)
                    healthy, refused = await asyncio.gather(client.post("/generate", json=self.HEALTHY), bad)
                    label = f"{path} {content[:120]!r}"
                    self.assertEqual(refused.status_code, 400, f"{label}: {refused.text[:300]}")
                    self.check_error(refused)
                    self.assertIn(refused.json()["type"], ("BadRequestError", "Bad Request"), label)
                    self.assertGreater(len(refused.json()["message"]), 15, label)
                    for key in ("text", "output_ids"):
                        self.assertEqual(healthy.json()[key], alone[key], label)

        asyncio.run(main())
        self.assertEqual(self.fake.context.manager.num_in_flight, 0)

    def check_error(self, reply):
        """Upstream's flat keys, and OpenAI's nested ones next to them."""
        body = reply.json()
        nested = {key: body[key] for key in ("message", "type", "param", "code")}
        if body["error"]["code"] == "context_length_exceeded":
            nested["code"] = "context_length_exceeded"
        self.assertEqual((body["object"], body["code"], body["error"]), ("error", reply.status_code, nested))

    def test_malformed_json(self):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            self.check_all(path, BAD_JSON)

    def test_generate(self):
        bodies = BAD_GENERATE + [{"text": "a", "sampling_params": params} for params in BAD_PARAMS]
        self.check_all("/generate", bodies)

    def test_amplifiers(self):
        """Refused before any text is tokenized."""
        manager, encoded = self.fake.context.manager, []
        encode = manager.encode_text

        async def watched(text, *args):
            if text != self.HEALTHY["text"]:
                encoded.append(text)
            return await encode(text, *args)

        with mock.patch.object(manager, "encode_text", watched):
            self.check_all("/generate", [{"text": "a", **body} for body in AMPLIFIERS])
            chat = {"messages": HI, "stop": ["x"] * 33}
            self.check_all("/v1/chat/completions", [chat, {"messages": HI, "rid": "x" * 257}])
            bodies = [{"prompt": "a", "logprobs": 129}, {"prompt": ["a"] * 3, "n": 1000}]
            self.check_all("/v1/completions", bodies)
            self.check_all("/abort_request", [{"rid": "x" * 257}])
            self.check_all("/tokenize", [{"prompt": ["a"] * 4097}])
            self.check_all("/detokenize", [{"tokens": [5] * ((1 << 20) + 99)}, {"tokens": [[5]] * ((1 << 20) + 99)}])
        self.assertEqual(encoded, [])

    def test_a_call_larger_than_the_queue_says_both_numbers(self):
        manager = self.fake.context.manager
        with mock.patch.object(manager, "max_requests_per_call", 5):
            for path, body in (
                ("/generate", {"text": ["a"] * 3, "sampling_params": {"n": 2}}),
                ("/generate", {"text": ["a"] * 3, "sampling_params": [{"n": 2}, {"n": 3}, {}]}),
                ("/generate", {"input_ids": [[5]] * 6}),
                ("/v1/completions", {"prompt": "a", "n": 6}),
                ("/v1/chat/completions", {"messages": HI, "n": 6, "stream": True}),
            ):
                reply = self.client.post(path, json=body)
                self.assertEqual(reply.status_code, 400, reply.text)
                self.assertRegex(reply.json()["message"], r"\b6 answers.*\bat most 5\b")
            self.assertEqual(self.client.post("/v1/completions", json={"prompt": "a", "n": 5}).status_code, 200)

    def test_log_probabilities_of_prompts_are_bounded(self):
        body = {"input_ids": [[5] * 100] * 42, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 124}
        reply = self.client.post("/generate", json=body)
        self.assertEqual(reply.status_code, 400)
        self.assertRegex(reply.json()["message"], "525000 log-probabilities .* one call gives at most 524288")
        with mock.patch.object(request_input, "MAX_PROMPT_LOGPROBS", 12_000):
            reply = self.client.post("/generate", json={**body, "input_ids": [5] * 100})
            self.assertRegex(reply.json()["message"], "12500 log-probabilities .* one prompt gives at most 12000")
            reply = self.client.post("/generate", json={**body, "input_ids": [5] * 96})
            self.assertEqual(reply.status_code, 200)
        self.assertEqual(self.client.post("/generate", json={**body, "logprob_start_len": 60}).status_code, 200)

    def test_completions(self):
        self.check_all("/v1/completions", BAD_COMPLETIONS)

    def test_chat(self):
        self.check_all("/v1/chat/completions", BAD_CHAT)

    def test_a_streaming_request_that_is_bad_gets_a_status_too(self):
        for path, body in (("/generate", {"text": ""}), ("/v1/completions", {"prompt": "a", "top_p": 2})):
            reply = self.client.post(path, json={**body, "stream": True})
            self.assertEqual((reply.status_code, reply.headers["content-type"]), (400, "application/json"))

    def test_over_long_prompt_says_both_numbers(self):
        for length in (200, CONTEXT_LEN):
            message = self.client.post("/v1/completions", json={"prompt": [5] * length}).json()["message"]
            said = f"The input ({length} tokens) is longer than the model's context length ({CONTEXT_LEN} tokens)"
            self.assertEqual(message, f"{said} without the one token that an output needs.")
        self.assertEqual(self.client.post("/v1/completions", json={"prompt": [5] * (CONTEXT_LEN - 1)}).status_code, 200)

    def test_wrong_content_type(self):
        for path in ("/generate", "/v1/completions", "/v1/chat/completions", "/abort_request", "/tokenize"):
            for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {}):
                reply = self.client.post(path, content=b'{"text": "a"}', headers=headers)
                self.assertEqual((reply.status_code, reply.json()["type"]), (400, "Bad Request"))
        packed = {**JSON, "content-encoding": "gzip"}
        reply = self.client.post("/generate", content=gzip.compress(b'{"text": "a"}'), headers=packed)
        self.assertEqual((reply.status_code, "send the body uncompressed" in reply.text), (400, True))
        headers = {"content-type": "Application/JSON; x", "content-encoding": "identity"}
        good = self.client.post("/generate", content=b'{"text": "a"}', headers=headers)
        self.assertEqual(good.status_code, 200)

    def test_no_such_path_or_method(self):
        for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
            reply = self.client.request(method, path)
            body = reply.json()
            self.assertEqual((reply.status_code, body["code"], body["type"]), (status, status, str(status)))
            self.check_error(reply)
            if status == 405:
                self.assertTrue(reply.headers["allow"])
        for path in UNSUPPORTED_PATHS:
            reply = self.client.post(path)
            self.assertEqual((reply.status_code, reply.headers["x-should-retry"]), (501, "false"), path)
            self.check_error(reply)

    def test_a_defect_of_ours_is_a_500_without_details(self):
        manager = self.fake.context.manager
        encode, manager._encode = manager._encode, None
        self.addCleanup(setattr, manager, "_encode", encode)
        logging.disable(logging.ERROR)
        self.addCleanup(logging.disable, logging.NOTSET)
        for path, body in (("/generate", {"text": "a"}), ("/v1/completions", {"prompt": "a", "stream": True})):
            reply = self.client.post(path, json=body)
            self.check_error(reply)
            self.assertEqual((reply.status_code, reply.json()["type"]), (500, "InternalServerError"))
            self.assertNotIn("NoneType' object", reply.text)


if __name__ == "__main__":
    unittest.main()
