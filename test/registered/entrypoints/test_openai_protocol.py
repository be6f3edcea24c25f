"""The OpenAI endpoints over a fake engine: with OpenAI's own client, and by the shape of each chunk."""

import json
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import httpx
import openai

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_scheduler import fake_logprob
from sglang.test.fake_server import CONTEXT_LEN, FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "naïve 😀?"}]


class OpenAITestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        defaults = {"temperature": 0.6, "top_k": 20}
        cls.fake = FakeServer(generation_defaults=defaults, enable_cache_report=True, api_key="k").wait_ready()
        cls.scheduler, cls.tokenizer = cls.fake.scheduler, cls.fake.tokenizer
        cls.scheduler.delay_s = 0.001
        cls.client = openai.OpenAI(base_url=f"{cls.fake.url}/v1", api_key="k", max_retries=0)
        cls.raw = httpx.Client(base_url=cls.fake.url, headers={"authorization": "Bearer k"}, timeout=60)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.raw.close()
        cls.fake.stop()

    def setUp(self):
        self.scheduler.received.clear()

    def answer_with(self, text, end=True):
        """Make the model say ``text``, and then its end token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        before = self.scheduler.script
        self.scheduler.script = lambda _: [*ids, 1] if end else ids
        self.addCleanup(setattr, self.scheduler, "script", before)
        return ids

    def sent_params(self):
        return self.scheduler.received[-1].sampling_params

    def chunks(self, path, body):
        reply = self.raw.post(path, json={**body, "stream": True})
        self.assertEqual(reply.status_code, 200, reply.text)
        lines = [line for line in reply.text.split("\n") if line]
        self.assertEqual(lines[-1], "data: [DONE]")
        return [json.loads(line[6:]) for line in lines[:-1]]


class TestChat(OpenAITestCase):
    def test_whole(self):
        self.answer_with("hello 😀")
        reply = self.client.chat.completions.create(model="default", messages=MESSAGES)
        choice = reply.choices[0]
        self.assertEqual((reply.object, reply.model), ("chat.completion", "default"))
        self.assertEqual((choice.message.role, choice.message.content), ("assistant", "hello 😀"))
        self.assertEqual((choice.finish_reason, choice.matched_stop), ("stop", 1))
        prompt = self.tokenizer.apply_chat_template(MESSAGES)
        sent = self.scheduler.received[-1].input_ids
        self.assertEqual(sent, self.tokenizer.encode(prompt, add_special_tokens=False))
        usage = reply.usage
        self.assertEqual((usage.prompt_tokens, usage.total_tokens), (len(sent), len(sent) + usage.completion_tokens))
        self.assertEqual(usage.prompt_tokens_details.cached_tokens, 1)

    def test_stream_with_the_client(self):
        self.answer_with("streamed naïve 你好")
        stream = self.client.chat.completions.create(
            model="default", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks[:-1]), "streamed naïve 你好")
        self.assertEqual(chunks[-1].choices, [])
        self.assertGreater(chunks[-1].usage.completion_tokens, 1)

    def test_stream_shape(self):
        self.answer_with("one two")
        first, *middle, last = self.chunks("/v1/chat/completions", {"messages": MESSAGES})
        self.assertEqual(first["choices"][0]["delta"], {"role": "assistant", "content": ""})
        self.assertTrue(middle)
        for chunk in middle:
            self.assertEqual(list(chunk["choices"][0]["delta"]), ["content"])
            self.assertIsNone(chunk["choices"][0]["finish_reason"])
        self.assertEqual((last["choices"][0]["delta"], last["choices"][0]["finish_reason"]), ({}, "stop"))
        self.assertEqual(last["choices"][0]["matched_stop"], 1)
        self.assertEqual({c["id"] for c in (first, *middle, last)}, {first["id"]})
        self.assertTrue(all(c["object"] == "chat.completion.chunk" and c["usage"] is None for c in middle))

    def test_continuous_usage(self):
        self.answer_with("one two")
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = self.chunks("/v1/chat/completions", {"messages": MESSAGES, "stream_options": options})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        self.assertEqual(counts, sorted(counts))
        self.assertEqual(counts[-1], len(self.tokenizer.encode("one two", False)) + 1)

    def test_stop_string(self):
        self.answer_with("tell me STOP no")
        for stream in (False, True):
            reply = self.client.chat.completions.create(
                model="default", messages=MESSAGES, stop=["STOP"], stream=stream
            )
            if stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            else:
                text = reply.choices[0].message.content
                self.assertEqual((reply.choices[0].finish_reason, reply.choices[0].matched_stop), ("stop", "STOP"))
            self.assertEqual(text, "tell me ")

    def test_n_and_logprobs(self):
        ids = self.answer_with("😀a")
        reply = self.client.chat.completions.create(
            model="default",
            messages=MESSAGES,
            n=2,
            logprobs=True,
            top_logprobs=2,
            seed=5,
            max_completion_tokens=len(ids),
        )
        self.assertEqual([choice.index for choice in reply.choices], [0, 1])
        content = reply.choices[1].logprobs.content
        self.assertEqual(bytes(sum((entry.bytes for entry in content), [])).decode(), "😀a")
        self.assertEqual([entry.logprob for entry in content], [fake_logprob(i) for i in ids])
        self.assertEqual(len(content[0].top_logprobs), 2)
        self.assertEqual(reply.usage.completion_tokens, 2 * len(ids))
        self.assertEqual(reply.usage.prompt_tokens, len(self.scheduler.received[-1].input_ids))
        first, second = (message.sampling_params.sampling_seed for message in self.scheduler.received)
        self.assertEqual(first, 5)
        self.assertNotEqual(second, 5)
        self.assertEqual({m.rid.split("#")[0].rsplit("_", 1)[0] for m in self.scheduler.received}, {reply.id})
        body = {"messages": MESSAGES, "n": 2, "logprobs": True, "max_tokens": len(ids)}
        chunks = self.chunks("/v1/chat/completions", body)
        for index in (0, 1):
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            entries = sum((c["logprobs"]["content"] for c in mine if c["logprobs"]), [])
            self.assertEqual([entry["logprob"] for entry in entries], [fake_logprob(i) for i in ids])

    def test_parameters_and_defaults(self):
        self.client.chat.completions.create(model="default", messages=MESSAGES)
        params = self.sent_params()
        self.assertEqual((params.temperature, params.top_k), (0.6, 20))
        self.assertEqual(params.max_new_tokens, CONTEXT_LEN - len(self.scheduler.received[-1].input_ids))
        extra = {"top_k": 3, "min_p": 0.1, "min_tokens": 2, "repetition_penalty": 1.1, "ignore_eos": True}
        self.client.chat.completions.create(
            model="default", messages=MESSAGES, temperature=0, top_p=0.5, max_tokens=4, max_completion_tokens=3,
            presence_penalty=0.1, frequency_penalty=-0.2, logit_bias={"7": -5}, stop="x", user="u", extra_body=extra,
            parallel_tool_calls=True, tool_choice="none", response_format={"type": "text"},
        )  # fmt: skip
        params = self.sent_params()
        self.assertEqual((params.temperature, params.top_p, params.top_k, params.min_p), (0, 0.5, 3, 0.1))
        self.assertEqual((params.max_new_tokens, params.min_new_tokens, params.stop), (3, 2, ["x"]))
        self.assertEqual((params.presence_penalty, params.frequency_penalty), (0.1, -0.2))
        self.assertEqual((params.logit_bias, params.ignore_eos, params.repetition_penalty), ({"7": -5}, True, 1.1))

    def test_a_slow_template_holds_up_nobody(self):
        entered, go = threading.Event(), threading.Event()

        def slow(*_, **__):
            entered.set()
            go.wait(60)
            return "hi"

        with mock.patch.object(self.tokenizer, "apply_chat_template", slow), ThreadPoolExecutor(1) as pool:
            self.addCleanup(go.set)
            chat = pool.submit(self.raw.post, "/v1/chat/completions", json={"messages": MESSAGES})
            self.assertTrue(entered.wait(60))
            other = self.raw.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})
            self.assertEqual((other.status_code, chat.done()), (200, False))
            go.set()
            self.assertEqual(chat.result().status_code, 200)

    def test_messages_as_parts_and_continuation(self):
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        self.client.chat.completions.create(model="default", messages=[{"role": "user", "content": parts}])
        text = self.tokenizer.decode(self.scheduler.received[-1].input_ids, skip_special_tokens=False)
        self.assertIn("onetwo", text)
        self.client.chat.completions.create(
            model="default",
            messages=[*MESSAGES, {"role": "assistant", "content": "It is"}],
            extra_body={"continue_final_message": True},
        )
        text = self.tokenizer.decode(self.scheduler.received[-1].input_ids, skip_special_tokens=False)
        self.assertTrue(text.endswith("<|assistant|>It is"), text)
        self.client.chat.completions.create(model="default", messages=MESSAGES, extra_body={"input_ids": [5, 6]})
        self.assertEqual(self.scheduler.received[-1].input_ids, [5, 6])

    def test_abort_by_response_id_ends_all_samples(self):
        self.scheduler.delay_s = 0.02
        self.addCleanup(setattr, self.scheduler, "delay_s", 0.001)
        stream = self.client.chat.completions.create(model="default", messages=MESSAGES, n=2, stream=True)
        chunks = iter(stream)
        first = next(chunks)
        self.raw.post("/abort_request", json={"rid": first.id})
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
        self.assertEqual(reasons, ["abort", "abort"])

    def test_errors_through_the_client(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(model="default", messages=MESSAGES, temperature=-1)
        self.assertIn("temperature", caught.exception.message)
        wrong = openai.OpenAI(base_url=f"{self.fake.url}/v1", api_key="wrong", max_retries=0)
        with self.assertRaises(openai.AuthenticationError):
            wrong.models.list()
        wrong.close()
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("other")


class TestCompletions(OpenAITestCase):
    def test_prompt_forms(self):
        ids = self.tokenizer.encode("ab")
        texts = []
        for prompt, count in (("ab", 1), (["ab", "cd"], 2), (ids, 1), ([ids, ids], 2)):
            reply = self.client.completions.create(model="default", prompt=prompt, max_tokens=3)
            self.assertEqual([choice.index for choice in reply.choices], list(range(count)))
            self.assertEqual((reply.object, reply.choices[0].finish_reason), ("text_completion", "length"))
            texts.append(reply.choices[0].text)
        self.assertEqual(len(set(texts)), 1)
        self.client.completions.create(model="default", prompt="ab")
        self.assertEqual(self.sent_params().max_new_tokens, 16)

    def test_usage_counts_a_prompt_once(self):
        reply = self.client.completions.create(model="default", prompt=["ab", "abcd"], n=2, max_tokens=3)
        prompts = len(self.tokenizer.encode("ab")) + len(self.tokenizer.encode("abcd"))
        self.assertEqual((reply.usage.prompt_tokens, reply.usage.completion_tokens), (prompts, 12))
        self.assertEqual(reply.usage.prompt_tokens_details.cached_tokens, 2)

    def test_echo_and_logprobs(self):
        for stream in (False, True):
            reply = self.client.completions.create(
                model="default", prompt="hello", max_tokens=4, echo=True, logprobs=2, stream=stream
            )
            choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
            text = "".join(choice.text for choice in choices)
            tokens, values, tops, offsets = [], [], [], []
            for choice in choices:
                tokens += choice.logprobs.tokens
                values += choice.logprobs.token_logprobs
                tops += choice.logprobs.top_logprobs
                offsets += choice.logprobs.text_offset
            self.assertTrue(text.startswith("hello"))
            self.assertEqual(values[:1] + tops[:1], [None, None])
            prompt_ids = self.tokenizer.encode("hello")
            self.assertEqual(values[1 : len(prompt_ids)], [fake_logprob(i) for i in prompt_ids[1:]])
            self.assertEqual(len(tokens), len(prompt_ids) + 4)
            for token, offset in zip(tokens, offsets):
                if token != "<s>":
                    self.assertEqual(text[offset : offset + len(token)], token)

    def test_echo_alone_scores_a_prompt(self):
        reply = self.client.completions.create(model="default", prompt="hello", max_tokens=0, echo=True)
        self.assertEqual(reply.choices[0].text, "hello")
        self.assertEqual(self.sent_params().max_new_tokens, 0)
        ids = self.tokenizer.encode("hello", add_special_tokens=False)
        reply = self.client.completions.create(model="default", prompt=[ids, ids[:2]], max_tokens=0, echo=True)
        self.assertEqual([c.text for c in reply.choices], ["hello", self.tokenizer.decode(ids[:2])])

    def test_stream(self):
        self.answer_with("one two naïve 😀")
        chunks = self.chunks("/v1/completions", {"prompt": ["a", "b"], "stream_options": {"include_usage": True}})
        for index in (0, 1):
            mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
            self.assertEqual("".join(choice["text"] for choice in mine), "one two naïve 😀")
            self.assertEqual([c["finish_reason"] for c in mine], [None] * (len(mine) - 1) + ["stop"])
        self.assertEqual(chunks[-1]["choices"], [])
        self.assertEqual({c["object"] for c in chunks}, {"text_completion"})

    def test_null_fields_mean_defaults(self):
        names = ["model", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "logprobs", "echo"]
        names += ["suffix", "logit_bias", "max_tokens", "best_of", "user", "rid", "lora_path", "session_params"]
        reply = self.raw.post("/v1/completions", json={"prompt": "a", **dict.fromkeys(names)})
        self.assertEqual(reply.status_code, 200, reply.text)
        self.assertEqual(reply.json()["model"], "default")


class TestModels(OpenAITestCase):
    def test_list_and_retrieve(self):
        (card,) = self.client.models.list().data
        self.assertEqual(self.client.models.retrieve(card.id).id, card.id)


class TestWithoutTokenizer(CustomTestCase):
    def test_only_ids(self):
        fake = FakeServer(skip_tokenizer_init=True).wait_ready()
        self.addCleanup(fake.stop)
        with httpx.Client(base_url=fake.url, timeout=60) as client:
            result = client.post(
                "/generate", json={"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3}}
            ).json()
            self.assertEqual((result["text"], result["output_ids"]), ("", [5, 6, 5]))
            # A reply without ids would say nothing.
            for path, body in (
                ("completions", {"prompt": [5, 6], "logprobs": 1}),
                ("completions", {"prompt": "a", "stream": True}),
                ("chat/completions", {"messages": MESSAGES}),
                ("chat/completions", {"messages": MESSAGES, "input_ids": [5]}),
                ("responses", {"input": "a"}),
            ):
                refused = client.post(f"/v1/{path}", json=body)
                self.assertEqual(refused.status_code, 400)
                self.assertRegex(refused.json()["message"], "--skip-tokenizer-init: use /generate")
            self.assertEqual(client.post("/tokenize", json={"prompt": "a"}).status_code, 400)


if __name__ == "__main__":
    unittest.main()
