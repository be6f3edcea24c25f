"""One real server on the embedded model: usual requests, failures, and that failures do not affect others."""

from __future__ import annotations

import http.client
import json
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=60, suite="stage-b-test-cpu")

GREEDY = {"temperature": 0.0, "max_new_tokens": 16}
LONG = {"temperature": 0.0, "max_new_tokens": 300, "ignore_eos": True}


class ServerCase(CustomTestCase):
    """A server for the class; ``other_args`` and ``env`` are set by subclasses."""

    other_args: tuple[str, ...] = ()
    env: dict[str, str] = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.url = free_url()
        cls.process = popen_launch_server(None, cls.url, other_args=cls.other_args, env=cls.env)
        cls.client = httpx.Client(base_url=cls.url, timeout=60, trust_env=False)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.client.close()
        kill_process_tree(cls.process.pid)
        cls.process.wait()

    def generate(self, text: str | list[str], params: dict[str, Any] | None = None, **fields: Any) -> Any:
        body = {"text": text, "sampling_params": GREEDY if params is None else params, **fields}
        answer = self.client.post("/generate", json=body)
        self.assertEqual(answer.status_code, 200, answer.text)
        return answer.json()

    def state(self) -> dict[str, Any]:
        return self.client.get("/server_info").json()["internal_states"][0]

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state()
            if state["num_running_reqs"] == 0 and state["num_queue_reqs"] == 0 and state["num_used_tokens"] == 0:
                return
            time.sleep(0.1)
        self.fail(f"requests are still held after {seconds} s: {state}")


class TestServer(ServerCase):
    other_args = ("--chunked-prefill-size", "64", "--enable-cache-report", "--random-seed", "7")

    def test_answers_questions(self) -> None:
        questions = heldout_questions(20, seed=3)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda q: self.generate(q.text)["text"], questions))
        right = sum(answer == q.answer for answer, q in zip(answers, questions, strict=True))
        self.assertGreaterEqual(right, 18, list(zip([q.text for q in questions], answers)))

    def test_openai_client(self) -> None:
        http_client = httpx.Client(trust_env=False)
        self.addCleanup(http_client.close)
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=http_client)
        self.assertTrue(client.models.list().data[0].id)
        messages: list[Any] = [{"role": "user", "content": "27+58="}]
        plain = client.chat.completions.create(model="default", messages=messages, temperature=0)
        self.assertEqual(plain.choices[0].message.content, "85")
        self.assertEqual(plain.choices[0].finish_reason, "stop")
        stream = client.chat.completions.create(
            model="default", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, "85")
        self.assertEqual(chunks[-1].usage.completion_tokens, plain.usage.completion_tokens)
        done = client.completions.create(model="default", prompt=["27+58=", "sort:3142="], temperature=0, logprobs=2)
        self.assertEqual([choice.text for choice in done.choices], ["85", "1234"])
        self.assertEqual(len(done.choices[0].logprobs.top_logprobs[0]), 2)

    def test_stream_is_cumulative_and_equals_the_answer(self) -> None:
        whole = self.generate("rev:abcd=", LONG)
        seen: list[str] = []
        with self.client.stream(
            "POST", "/generate", json={"text": "rev:abcd=", "sampling_params": LONG, "stream": True}
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        self.assertEqual(lines[-1], "data: [DONE]")
        seen = [json.loads(line.removeprefix("data: "))["text"] for line in lines[:-1]]
        self.assertTrue(all(b.startswith(a) for a, b in zip(seen, seen[1:])))
        self.assertEqual(seen[-1], whole["text"])

    def test_seeds(self) -> None:
        params = {"temperature": 1.5, "max_new_tokens": 24, "ignore_eos": True, "sampling_seed": 11}
        alone = self.generate("27+58=", params)["output_ids"]
        crowd = self.generate(["27+58="] * 3 + ["sort:312="], [params, {**params, "sampling_seed": 12}, params, params])
        self.assertEqual([row["output_ids"] for row in crowd][::2][0], alone)
        self.assertEqual(crowd[2]["output_ids"], alone)
        self.assertNotEqual(crowd[1]["output_ids"], alone)

    def test_samples_with_a_seed(self) -> None:
        """The n samples are independent, the first as with n = 1, on every endpoint; a repetition gives the same."""
        native = {"temperature": 2.0, "max_new_tokens": 12, "sampling_seed": 3, "ignore_eos": True}
        body = {"temperature": 2.0, "max_tokens": 12, "seed": 3, "ignore_eos": True, "model": "default"}
        chat = {**body, "messages": [{"role": "user", "content": "hello"}]}
        single = self.generate("hello", native)["text"]
        wanted = [answer["text"] for answer in self.generate("hello", {**native, "n": 5})]
        self.assertEqual((wanted[0], len(set(wanted))), (single, 5))
        mixed = self.generate(["hello", "27+", "hello"], [{**native, "n": 5}, native, {**native, "n": 2}])
        self.assertEqual([answer["text"] for answer in mixed[:5] + mixed[6:]], wanted + wanted[:2])
        for path, fields in (("/v1/completions", {**body, "prompt": ["hello", "27+"]}), ("/v1/chat/completions", chat)):
            with self.subTest(path):
                alone = self.client.post(path, json=fields).json()["choices"]
                answer = self.client.post(path, json={**fields, "n": 5}).json()["choices"]
                texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer]
                first = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in alone]
                self.assertEqual(texts[::5], first)
                self.assertEqual(len(set(texts)), len(texts))
                if path == "/v1/completions":
                    self.assertEqual(texts[:5], wanted)
                streamed = [""] * len(texts)
                with self.client.stream("POST", path, json={**fields, "n": 5, "stream": True}) as stream:
                    for line in stream.iter_lines():
                        if line.startswith("data: {"):
                            for choice in json.loads(line[6:])["choices"]:
                                part = choice["text"] if "text" in choice else choice["delta"].get("content")
                                streamed[choice["index"]] += part or ""
                self.assertEqual(streamed, texts)

    def test_prompt_tokens_are_counted_whole(self) -> None:
        before = self.state()["num_prompt_tokens"]
        for _ in range(3):
            self.generate("a=3,c=7;c?")
        single = self.generate("a=3,c=7;c?")["meta_info"]["prompt_tokens"]
        self.assertEqual(self.state()["num_prompt_tokens"] - before, 4 * single)

    def test_requests_that_nothing_can_be_drawn_for(self) -> None:
        """Every id of the vocabulary forbidden: an error, not an invented output; other requests are not affected."""
        vocab = self.client.get("/server_info").json()["vocab_size"]
        params = {"max_new_tokens": 4, "min_new_tokens": 2, "stop_token_ids": list(range(vocab))}
        with ThreadPoolExecutor(2) as pool:
            good = pool.submit(self.generate, "27+58=")
            answer = self.client.post("/generate", json={"text": "27+58=", "sampling_params": params})
        self.assertEqual(answer.status_code, 400, answer.text)
        self.assertIn("no logit is finite", answer.text)
        self.assertEqual(good.result()["text"], "85")

    def test_a_stop_string_in_the_visible_text(self) -> None:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "stop": ["51"]}
        answer = self.generate("27+58=", params)
        self.assertEqual((answer["text"], answer["meta_info"]["finish_reason"]["matched"]), ("8", "51"))

    def test_logprobs(self) -> None:
        result = self.generate(
            "27+58=", return_logprob=True, logprob_start_len=0, top_logprobs_num=2, token_ids_logprob=[5]
        )
        meta = result["meta_info"]
        self.assertEqual(len(meta["output_token_logprobs"]), len(result["output_ids"]))
        self.assertIsNone(meta["input_token_logprobs"][0][0])
        self.assertEqual(len(meta["input_token_logprobs"]), meta["prompt_tokens"])
        for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
            self.assertEqual((value, token), tuple(top[0][:2]))

    def test_stop_string_never_leaks(self) -> None:
        full = self.generate("rev:abcdef=", LONG)["text"]
        stop = full[3:6]
        result = self.generate("rev:abcdef=", {**LONG, "stop": stop})
        self.assertEqual(result["text"], full[: full.index(stop)])
        self.assertEqual(result["meta_info"]["finish_reason"], {"type": "stop", "matched": stop})

    def test_stop_strings_before_min_new_tokens_are_text(self) -> None:
        ids = self.generate("rev:abcdef=", LONG)["output_ids"]
        for least in (3, 6, 40):
            params = {**LONG, "max_new_tokens": 60, "min_new_tokens": least, "stop": ["cb", "f", "a"]}
            whole = self.generate("rev:abcdef=", params)
            body = {"text": "rev:abcdef=", "sampling_params": params, "stream": True}
            with self.client.stream("POST", "/generate", json=body) as answer:
                *_, last, done = (line for line in answer.iter_lines() if line)
            self.assertEqual(done, "data: [DONE]")
            streamed = json.loads(last.removeprefix("data: "))
            self.assertEqual(streamed["text"], whole["text"])
            self.assertEqual(streamed["meta_info"]["finish_reason"], whole["meta_info"]["finish_reason"])
            number = whole["meta_info"]["completion_tokens"]
            self.assertGreaterEqual(number, least)
            before = self.client.post("/detokenize", json={"tokens": ids[: number - 1]}).json()["text"]
            self.assertTrue(whole["text"].startswith(before[:-1]), (whole, before))

    def test_prefix_cache_is_reported(self) -> None:
        text = "".join(q.text + q.answer for q in heldout_questions(30, seed=9))
        first = self.generate(text)
        second = self.generate(text)
        self.assertEqual(first["output_ids"], second["output_ids"])
        self.assertGreater(second["meta_info"]["cached_tokens"], 100)

    def test_bad_input_beside_a_healthy_request(self) -> None:
        reference = self.generate("rev:abcd=", LONG)["output_ids"]
        vocab = 10**6
        bad: list[tuple[str, bytes | dict[str, Any]]] = [
            ("/generate", b"{not json"),
            ("/generate", b'{"text": "a", "sampling_params": {"temperature": NaN}}'),
            ("/generate", {"text": 5}),
            ("/generate", {"text": ""}),
            ("/generate", {}),
            ("/generate", {"text": "a", "input_ids": [1]}),
            ("/generate", {"input_ids": []}),
            ("/generate", {"input_ids": [1, vocab]}),
            ("/generate", {"input_ids": [-1]}),
            ("/generate", {"input_ids": [3] * 100_000}),
            ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}),
            ("/generate", {"text": "a", "sampling_params": {"top_p": 0}}),
            ("/generate", {"text": "a", "sampling_params": {"top_p": 2}}),
            ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": "many"}}),
            ("/generate", {"text": "a", "sampling_params": {"regex": "(a"}}),
            ("/generate", {"text": "a", "sampling_params": {"logit_bias": {str(vocab): 1.0}}}),
            ("/v1/completions", {"model": "default", "prompt": ""}),
            ("/v1/completions", {"model": "default", "prompt": [vocab]}),
            ("/v1/chat/completions", {"model": "default", "messages": []}),
            ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user"}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "temperature": -2}),
        ]
        with ThreadPoolExecutor(1) as pool:
            healthy = pool.submit(self.generate, "rev:abcd=", LONG)
            for path, body in bad:
                with self.subTest(path=path, body=str(body)[:60]):
                    content = body if isinstance(body, bytes) else json.dumps(body).encode()
                    answer = self.client.post(path, content=content, headers={"content-type": "application/json"})
                    self.assertEqual(answer.status_code, 400, answer.text)
                    document = answer.json()
                    message = document.get("error", document)["message"]
                    self.assertGreater(len(message), 10)
            self.assertEqual(healthy.result()["output_ids"], reference)
        self.wait_until_idle()

    def test_disconnect_frees_everything(self) -> None:
        reference = self.generate("rev:abcd=", LONG)["output_ids"]
        host, port = self.url.removeprefix("http://").split(":")
        aborted = self.state()["num_aborted_reqs"]
        with ThreadPoolExecutor(1) as pool:
            healthy = pool.submit(self.generate, "rev:abcd=", LONG)
            for prompt_tokens, read in ((4, 1), (4, 400), (3000, 0), (3000, 1)):
                params = {"max_new_tokens": 900, "ignore_eos": True, "temperature": 0}
                body = {
                    "input_ids": [20 + prompt_tokens % 7] * prompt_tokens,
                    "sampling_params": params,
                    "stream": True,
                }
                connection = http.client.HTTPConnection(host, int(port), timeout=60)
                connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
                if read:
                    connection.getresponse().read(read)
                connection.close()
            self.assertEqual(healthy.result()["output_ids"], reference)
        self.wait_until_idle()
        self.assertEqual(self.state()["num_aborted_reqs"] - aborted, 4, "some ran to their end")

    def test_abort_request(self) -> None:
        params = {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 0}
        with ThreadPoolExecutor(1) as pool:
            doomed = pool.submit(self.generate, "rev:abcd=", params, rid="doomed-1")
            while not self.state()["num_running_reqs"]:
                time.sleep(0.02)
            self.assertEqual(self.client.post("/abort_request", json={"rid": "doomed"}).status_code, 200)
            self.assertEqual(doomed.result(20)["meta_info"]["finish_reason"]["type"], "abort")
        self.wait_until_idle()

    def test_flush_and_info(self) -> None:
        self.wait_until_idle()
        self.assertEqual(self.client.post("/flush_cache").status_code, 200)
        info = self.client.get("/server_info").json()
        self.assertEqual(info["chunked_prefill_size"], 64)
        kernels = {row["op"]: row["chosen"] for row in info["internal_states"][0]["kernels"]}
        self.assertEqual(kernels["sampling.greedy"], "torch")
        self.assertEqual(info["internal_states"][0]["missing_kernel_modules"], {})
        self.assertEqual(self.state()["unpickled_while_serving"], 0)


class TestRetractionAndSmallPool(ServerCase):
    """A pool that is too small for all requests: every output is that of a run alone."""

    other_args = (
        "--max-total-tokens", "600", "--schedule-conservativeness", "0.05", "--page-size", "4",
        "--chunked-prefill-size", "64",
    )  # fmt: skip

    def test_crowd(self) -> None:
        texts = [q.text for q in heldout_questions(12, seed=5)]
        params = {"temperature": 0.0, "max_new_tokens": 120, "ignore_eos": True}
        alone = [self.generate(text, params)["output_ids"] for text in texts]
        with ThreadPoolExecutor(12) as pool:
            crowd = [row["output_ids"] for row in pool.map(lambda text: self.generate(text, params), texts)]
        self.assertEqual(crowd, alone)
        self.assertGreater(self.state()["num_retracted_reqs"], 0)
        self.wait_until_idle()


class TestDeath(ServerCase):
    """When the scheduler dies, clients get an error and the server ends."""

    def test_scheduler_killed(self) -> None:
        import psutil

        results: list[Any] = []

        def ask() -> None:
            body = {"text": "rev:abcd=", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
            try:
                results.append(self.client.post("/generate", json=body).status_code)
            except httpx.HTTPError as error:
                results.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not self.state()["num_running_reqs"]:
            time.sleep(0.02)
        children = psutil.Process(self.process.pid).children(recursive=True)
        victim = next(child for child in children if "scheduler_process" in " ".join(child.cmdline()))
        victim.kill()
        thread.join(60)
        self.assertEqual(len(results), 1, "the request in flight was never answered")
        self.assertNotEqual(results[0], 200)
        self.assertNotEqual(self.process.wait(60), 0)
        self.assertTrue(all(not child.is_running() or child.status() == "zombie" for child in children))


if __name__ == "__main__":
    unittest.main()
