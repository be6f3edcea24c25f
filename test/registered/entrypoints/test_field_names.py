"""Errors of the OpenAI endpoints name the fields that the client sent, in ``message`` and ``param``."""

import unittest

from sglang.srt.managers.io_struct import FinishReason, GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import CONTEXT_LEN, FakeServerTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPTS = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, TEXT: {"prompt": "a"}, RESPONSES: {"input": "a"}}
LONG, BAD_SCHEMA = "word " * 500, {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nope"}}}
LONG_IDS = [5] * CONTEXT_LEN
# Path, body, and the field that it is about, where that has another name in native requests.
CASES = (
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": -1, "max_tokens": 4}, "max_completion_tokens"),
    (CHAT, {"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"min_tokens": -1}, "min_tokens"),
    (CHAT, {"seed": 1 << 70}, "seed"),
    (CHAT, {"response_format": BAD_SCHEMA}, "response_format"),
    (CHAT, {"guided_regex": "("}, "guided_regex"),
    (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs"),
    (CHAT, {"regex": "("}, "regex"),
    (CHAT, {"input_ids": [-1]}, "input_ids"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    (TEXT, {"max_tokens": -1}, "max_tokens"),
    (TEXT, {"min_tokens": 17}, "min_tokens"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": [[5], []]}, "prompt"),
    (TEXT, {"prompt": LONG}, "prompt"),
    (TEXT, {"prompt": LONG_IDS}, "prompt"),
    (TEXT, {"logprobs": -1}, "logprobs"),
    (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", **BAD_SCHEMA["json_schema"]}}}, "text.format"),
    (RESPONSES, {"input": LONG}, "input"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"seed": 1 << 70}, "seed"),
    *((path, {field: value}, field) for path in PROMPTS for field, value in (
        ("temperature", -1), ("top_p", 2), ("top_k", -3), ("min_p", 2), ("repetition_penalty", 0),
        ("temperature", "hot"), ("request_timeout", -1),
    )),
    *((path, {field: value}, field) for path in (CHAT, TEXT) for field, value in (
        ("n", 0), ("stop", [""]), ("stop_token_ids", [-1]), ("logit_bias", {"x": 1}), ("frequency_penalty", 3),
        ("stream_options", {"include_usage": 3}), ("n", "two"),
    )),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"best_of": 4}, "best_of"),
)  # fmt: skip
# What only native requests have, without ordinary words.
NATIVE = {*GenerateReqInput.__struct_fields__, *SamplingParams.__struct_fields__}
NATIVE -= {"text", "stream", "model", "regex", "n"}


class TestFieldNames(FakeServerTestCase):
    def test_what_was_sent_is_named(self):
        for path, fields, name in CASES:
            for stream in (False, True):
                body = {**PROMPTS[path], **fields, "stream": stream}
                with self.subTest(path=path, fields=str(fields)[:100], stream=stream):
                    reply = self.client.post(path, json=body)
                    self.assertEqual(reply.status_code, 400, reply.text[:300])
                    error = reply.json()["error"]
                    self.assertEqual(error["param"], name, error["message"])
                    words = set(error["message"].replace("`", " ").replace(".", " ").split())
                    self.assertLessEqual(words & NATIVE, {*body, "max_tokens"}, error["message"])

    def test_a_field_that_is_missing(self):
        for path, body in PROMPTS.items():
            self.assertEqual(self.client.post(path, json={}).json()["error"]["param"], *body)

    def test_a_prompt_that_does_not_fit_has_openais_code(self):
        for path, body in (
            (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
            (CHAT, {"messages": [{"role": "user", "content": LONG * 40}]}),
            (TEXT, {"prompt": LONG_IDS}),
            (RESPONSES, {"input": LONG, "stream": True}),
        ):
            error = self.client.post(path, json=body).json()["error"]
            self.assertEqual(error["code"], "context_length_exceeded", error["message"])

    def test_names_of_constraints_stay_where_they_are_words(self):
        body = {**PROMPTS[CHAT], "response_format": {"type": "xml"}}
        error = self.client.post(CHAT, json=body).json()["error"]
        self.assertRegex(error["message"], "^response_format.type .*'json_schema' or 'structural_tag', got 'xml'")

        error = self.client.post(RESPONSES, json={"input": "a", "text": {"format": {"type": "xml"}}}).json()["error"]
        self.assertRegex(error["message"], "^text.format.type must be ")

    def test_native_requests_keep_theirs(self):
        error = self.client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": -1}}).json()
        self.assertIn("max_new_tokens must be", error["message"])

    def test_later_errors(self):
        """Of a request that a scheduler ends, before and after the first chunk; other errors are left alone."""
        for status, said in ((400, "fewer min_tokens"), (500, "fewer min_new_tokens")):
            reason = FinishReason(type="abort", message="fewer min_new_tokens", status_code=status)
            self.fake.scheduler.error = reason
            self.addCleanup(setattr, self.fake.scheduler, "error", None)
            for path, prompt in PROMPTS.items():
                for stream in (False, True):
                    with self.subTest(status=status, path=path, stream=stream):
                        self.assertIn(said, self.client.post(path, json={**prompt, "stream": stream}).text)


if __name__ == "__main__":
    unittest.main()
