"""Fields of bodies: model names, whole numbers as floats, refused fields, unknown ones that are logged once."""

import ast
import logging
import re
import typing
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import sglang
from sglang.srt.entrypoints.openai.output_form import READERS
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.request_fields import REFUSED_FIELDS, TOLERATED_FIELDS, UnknownFields
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.limits import MAX_UNKNOWN_FIELDS_LOGGED, MAX_WARNINGS
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

HI = [{"role": "user", "content": "hi"}]
PATHS = {
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 2},
}
# A value with which each refused field asks for something; any text does for the others.
ASKING = {"add_generation_prompt": False, "include_reasoning": False, "prompt_logprobs": 0, "best_of": 3, "echo": True}
NOT_ASKING = {"add_generation_prompt": True, "include_reasoning": True, "best_of": 1, "length_penalty": 1.0,
              "verbosity": "medium", "function_call": "none", "use_beam_search": False, "bad_words": [],
              "structured_outputs": {}, "separate_reasoning": False}  # fmt: skip


class TestModelNames(FakeServerTestCase):
    settings = {"served_model_name": "tiny"}

    def test_served_names(self):
        for path, body in list(PATHS.items())[1:]:
            for name in ("tiny", "default", "", None):
                reply = self.client.post(path, json={**body, "model": name})
                self.assertEqual(reply.status_code, 200, reply.text)
                self.assertEqual(reply.json()["model"], name or "default")
            for name in ("gpt-17", "tiny:adapter", "default:adapter", "Tiny", "x" * 10**6):
                for stream in (False, True):
                    reply = self.client.post(path, json={**body, "model": name, "stream": stream})
                    error = reply.json()["error"]
                    got = reply.status_code, error["code"], error["param"]
                    self.assertEqual(got, (404, "model_not_found", "model"), name[:20])
                    self.assertIn("'tiny'", error["message"])
                    self.assertLess(len(error["message"]), 300)
        self.assertEqual(self.client.get("/v1/models/tiny:adapter").status_code, 404)
        self.assertEqual(self.client.get("/v1/models/default").json()["id"], "tiny")

    def test_the_last_part_of_a_path_counts_only_without_a_served_name(self):
        context = self.fake.context
        last = context.server_args.model_path.rpartition("/")[2]
        reply = self.client.post("/v1/completions", json={"prompt": "a", "model": last})
        self.assertEqual(reply.status_code, 404)
        with mock.patch.object(
            context, "server_args", replace(context.server_args, served_model_name=context.server_args.model_path)
        ):
            for name in (last, context.server_args.model_path, context.server_args.model_path + "/"):
                reply = self.client.post("/v1/completions", json={"prompt": "a", "model": name})
                self.assertEqual(reply.status_code, 200, name)
            self.assertEqual(self.client.post("/v1/completions", json={"prompt": "a", "model": "x"}).status_code, 404)


class TestNumbers(FakeServerTestCase):
    """A whole number as a float is accepted, any other number is refused, for each integer field."""

    def integer_fields(self):
        for path, body_type in (
            ("/v1/completions", CompletionRequest),
            ("/v1/chat/completions", ChatCompletionRequest),
            ("/generate", GenerateReqInput),
        ):
            for name, hint in typing.get_type_hints(body_type).items():
                if re.search(r"\bint\b", str(hint)) and name != "prompt":
                    yield path, name

    def test_every_integer_field(self):
        seen = 0
        extra = {"top_logprobs": {"logprobs": True}, "top_logprobs_num": {"return_logprob": True}}
        extra["token_ids_logprob"] = extra["logprob_start_len"] = extra["top_logprobs_num"]
        lists = {"stop_token_ids", "input_ids", "token_ids_logprob"}
        for path, name in self.integer_fields():
            body = {**PATHS[path], **extra.get(name, {})}
            if name == "input_ids" and path == "/generate":
                del body["text"]
            for value, status in ((1.0, 200), (1e0, 200), (1.5, 400)):
                reply = self.client.post(path, json={**body, name: [value] if name in lists else value})
                self.assertEqual(reply.status_code, status, f"{path} {name}={value}: {reply.text[:200]}")
            seen += 1
        self.assertGreater(seen, 15)

    def test_sampling_params(self):
        params = {"max_new_tokens": 2.0, "min_new_tokens": 1.0, "top_k": 20.0, "n": 1.0, "stop_token_ids": [7.0],
                  "sampling_seed": 3.0, "stream_interval": 1.0, "temperature": 1, "logit_bias": {"5": 1}}  # fmt: skip
        self.assertEqual(self.generate(text="a", sampling_params=params).status_code, 200)
        sent = self.fake.scheduler.received[-1].sampling_params
        self.assertEqual((sent.max_new_tokens, sent.top_k, sent.stop_token_ids), (2, 20, [7]))
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n", "sampling_seed", "stream_interval"):
            self.assertEqual(self.generate(text="a", sampling_params={name: 1.5}).status_code, 400, name)
        for ids in ([1.0, 2.0], [[1.0]]):
            self.assertEqual(self.client.post("/v1/completions", json={"prompt": ids}).status_code, 200)
        self.assertEqual(self.client.post("/detokenize", json={"tokens": [5.0]}).status_code, 200)

    def test_duplicates_are_sent_once(self):
        params = {"max_new_tokens": 1, "stop_token_ids": [9, 9, 8, 9]}
        reply = self.generate(text="a", sampling_params=params, return_logprob=True, token_ids_logprob=[5, 7, 5] * 1000)
        self.assertEqual([entry[1] for entry in reply.json()["meta_info"]["output_token_ids_logprobs"][0]], [5, 7])
        self.assertEqual(self.fake.scheduler.received[-1].sampling_params.stop_token_ids, [9, 8])


class TestFields(FakeServerTestCase):
    def setUp(self):
        super().setUp()
        self.fake.context.manager.unknown_fields = UnknownFields()

    def test_refused_by_name_where_they_ask(self):
        known = {
            "/generate": GenerateReqInput.__struct_fields__,
            "/v1/completions": CompletionRequest.__struct_fields__,
            "/v1/chat/completions": ChatCompletionRequest.__struct_fields__,
        }
        for path, body in PATHS.items():
            for name in REFUSED_FIELDS.keys() - set(known[path]):
                asked = {**body, name: ASKING.get(name, "x")}
                reply = self.client.post(path, json=asked)
                got = reply.status_code, reply.json()["param"]
                self.assertEqual(got, (400, name), f"{path} {name}: {reply.text[:200]}")
                self.assertTrue(reply.json()["message"].startswith(f"{name} is not supported"))
            with self.assertNoLogs("sglang.srt.managers.request_fields", logging.WARNING):
                harmless = {name: None for name in REFUSED_FIELDS} | NOT_ASKING | {"echo": False}
                harmless |= {name: 3 for name in TOLERATED_FIELDS - set(known[path])} | {"model": None}
                reply = self.client.post(path, json={**harmless, **body})
            self.assertEqual(reply.status_code, 200, reply.text)
        for name in ("allowed_token_ids", "bad_words", "custom_logit_processor"):
            reply = self.generate(text="a", sampling_params={name: ["x"]})
            self.assertEqual((reply.status_code, reply.json()["param"]), (400, name))
        for body in ({"best_of": 2}, {"best_of": 1, "n": 2}, {"response_format": {"type": "xml"}}):
            reply = self.client.post("/v1/completions", json={**PATHS["/v1/completions"], **body})
            self.assertEqual(reply.status_code, 400, body)
        reply = self.client.post("/v1/completions", json={"prompt": "a", "best_of": 2, "n": 2})
        self.assertEqual(reply.status_code, 200)

    def test_unknown_ones_are_named_once_in_the_log(self):
        for path, body in PATHS.items():
            body = {**body, "temprature": 0, f"only{path}": 1}
            with self.assertLogs("sglang.srt.managers.request_fields", logging.WARNING) as logged:
                for _ in range(3):
                    reply = self.client.post(path, json=body)
                    self.assertEqual(reply.status_code, 200, reply.text)
                    self.assertNotIn("warnings", reply.text)
            count = 2 if path == "/generate" else 1
            self.assertEqual(len(logged.records), count, logged.output)
        text = "\n".join(logged.output)
        self.assertIn("only/v1/chat/completions", text)

    def test_warnings_on_demand(self):
        hint = "Request field 'temprature' is unknown and is ignored; did you mean 'temperature'?"
        nested = {"stream_options": {"include_usge": True}}
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = {**PATHS[path], "temprature": 0, **nested, "return_warnings": True}
            if "chat" in path:
                content = [{"type": "text", "text": "a", "colour": 1}]
                body["messages"] = [{"role": "user", "content": content, "contnt": "b"}]
            got = self.client.post(path, json=body).json()["warnings"]
            wanted = [hint, "'stream_options.include_usge'.*'include_usage'"]
            wanted += ["'messages.contnt'.*'content'", "'messages.content.colour'"] if "chat" in path else []
            self.assertEqual(len(got), len(wanted), got)
            for text, pattern in zip(got, wanted):
                self.assertRegex(text, pattern.replace("?", r"\?"))
            events = self.client.post(path, json={**body, "stream": True}).text.split("\n\n")
            self.assertIn('"warnings":["Request field', events[0])
            self.assertNotIn("warnings", "".join(events[1:]))
            self.assertEqual(
                self.client.post(path, json={**PATHS[path], "return_warnings": True}).json()["warnings"], []
            )
        body = {"text": ["a", "b"], "sampling_params": {"max_tokens": 3}, "temprature": 0, "return_warnings": True}
        for result in self.generate(**body).json():
            first, second = result["meta_info"]["warnings"]
            self.assertRegex(first + second, "'temprature'.*'sampling_params.max_tokens'.*'max_new_tokens'")

    def test_a_client_can_grow_neither_memory_nor_log_nor_answer(self):
        fields = self.fake.context.manager.unknown_fields
        with self.assertLogs("sglang.srt.managers.request_fields", logging.WARNING) as logged:
            for start in range(0, 600, 100):
                names = {f"\n{'y' * 500}{i}": 1 for i in range(3)} | {f"z{i + start}": 1 for i in range(100)}
                reply = self.client.post("/v1/completions", json={"prompt": "a", **names, "return_warnings": True})
                self.assertEqual(len(reply.json()["warnings"]), MAX_WARNINGS)
        self.assertEqual(len(logged.records), MAX_UNKNOWN_FIELDS_LOGGED + 1)
        self.assertTrue(all(len(line) < 200 and "\n" not in line for line in logged.output))
        self.assertEqual(len(fields._logged), MAX_UNKNOWN_FIELDS_LOGGED)

    def test_other_endpoints(self):
        for path, body in (
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [5]}),
            ("/abort_request", {"rid": "a"}),
        ):
            with self.assertLogs("sglang.srt.managers.request_fields", logging.WARNING):
                self.assertEqual(self.client.post(path, json={**body, f"odd{path}": 1}).status_code, 200)


class TestTable(CustomTestCase):
    def test_no_field_is_in_two_tables(self):
        own = set(GenerateReqInput.__struct_fields__) | set(ChatCompletionRequest.__struct_fields__)
        # The chat endpoint has a meaning for them, and judges them itself.
        forms = {"json_schema", "regex", "ebnf", "structural_tag", "structured_outputs"}
        guided = {f"guided_{name}" for name in ("json", "regex", "choice", "grammar")}
        self.assertEqual(own & REFUSED_FIELDS.keys(), {"separate_reasoning", *forms, *guided})
        self.assertEqual(TOLERATED_FIELDS & REFUSED_FIELDS.keys(), set())

    def test_every_field_that_is_accepted_is_read(self):
        """Somewhere the product reads an attribute of this name; a field that is not read changes no output."""
        product = Path(sglang.__file__).parent
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (product / "srt").rglob("*.py")]
        read = {node.attr for tree in trees for node in ast.walk(tree) if _is_read(node)} | READERS.keys()
        for schema in (
            GenerateReqInput, TokenizedGenerateReqInput, AbortReq, SamplingParams, StreamOptions, CompletionRequest,
            ChatCompletionRequest,
        ):  # fmt: skip
            self.assertEqual(set(schema.__struct_fields__) - read, set(), schema.__name__)


def _is_read(node):
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)


if __name__ == "__main__":
    unittest.main()
