"""Random requests of every kind under random settings: each has the answer that it has alone on a plain engine."""

import random
import unittest
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.environ import envs
from sglang.srt.layers.moe import topk
from sglang.srt.managers.detokenizer_manager import RequestText
from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput, FlushCacheReqInput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_amd_ci, register_cpu_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=180, suite="nightly-cpu", nightly=True)
register_cuda_ci(est_time=420, suite="nightly-1-gpu", nightly=True)
register_amd_ci(est_time=900, suite="nightly-amd-1-gpu", nightly=True)

WALKS, V4 = 40, "deepseek-v4-tiny"
SCHEMA = '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}},"required":["a"]}'
NUMBERS, WORDS = r"[0-9]{1,9}(\+[0-9]+)*", 'root ::= "yes" | "no" | ("a" root)'
FORMS = (("json_schema", SCHEMA), ("regex", NUMBERS), ("regex", "(12|7)?"), ("ebnf", WORDS))
STOPS = ("1", "46", "=", "x", "7+", "\n", " and", "é")


class Request(NamedTuple):
    """Ids of a prompt, raw sampling parameters, and fields of the message."""

    ids: list[int]
    params: dict[str, Any]
    fields: dict[str, Any]


class TextHarness(EngineHarness):
    """Also turns tokens into the text that a client reads."""

    def __init__(self, model: str, **options: Any) -> None:
        self.texts: dict[str, str] = {}
        self.readers: dict[str, RequestText] = {}
        self.tokenizer = Tokenizer.from_path(str(EMBEDDED_MODELS[model]))
        super().__init__(str(EMBEDDED_MODELS[model]), with_tokenizer=True, dtype="float32", random_seed=3, **options)

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None:
        super().to_detokenizer(message)
        for output in message.outputs:
            reader = self.readers.setdefault(output.rid, RequestText(output, self.tokenizer))
            self.texts[output.rid] = self.texts.get(output.rid, "") + reader.push(output)

    def answer(self, rid: str) -> list[Any]:
        """Tokens, finish reason and text, and log-probabilities without the ids of the best, which may be tied."""
        found = self.results[rid]
        scores = [
            None if each is None else [each.logprobs, each.chosen, [[p for p, _ in row or ()] for row in each.top]]
            for each in (found.input_logprobs, found.output_logprobs)
        ]
        return [found.output_ids, found.finish_reason, self.texts.get(rid), scores]


def maybe(rng: random.Random, share: float, key: str, *values: Any) -> dict[str, Any]:
    return {key: rng.choice(values)} if rng.random() < share else {}


def a_request(rng: random.Random, tokenizer: Tokenizer, vocab: int, text: str, before: list[Request], limit: int):
    """A prompt, often one that begins as an earlier one does, or of a length at a limit; its parameters; its fields."""
    ids = tokenizer.encode(text)
    kind = rng.randrange(4)
    if kind < 2 and before:
        earlier = rng.choice(before).ids
        ids = earlier[: rng.randint(1, len(earlier))] + ids * kind
    elif kind == 2:
        ids = (ids * limit)[: rng.choice((1, 2, 15, 16, 17, 65, limit - 1, limit))]
    ids = ids[:limit]
    longest = rng.choice((0, 1, 2, 5, 13, 24))
    params: dict[str, Any] = {"max_new_tokens": longest, "temperature": 0.0, "ignore_eos": rng.random() < 0.3}
    if rng.random() < 0.5:
        params |= {"temperature": rng.choice((0.3, 0.7, 2.0)), "sampling_seed": rng.randint(-9, 10**9)}
        params |= maybe(rng, 0.4, "top_k", 1, 5, 20) | maybe(rng, 0.4, "top_p", 0.3, 0.9)
        params |= maybe(rng, 0.3, "min_p", 0.1)
    params |= maybe(rng, 0.3, "frequency_penalty", -1.0, 0.7, 2.0) | maybe(rng, 0.2, "presence_penalty", -0.5, 1.5)
    params |= maybe(rng, 0.2, "repetition_penalty", 0.5, 1.3) | maybe(rng, 0.25, "min_new_tokens", longest // 2)
    params |= maybe(rng, 0.2, "logit_bias", {str(i): rng.choice((-100.0, 4.0)) for i in rng.sample(range(vocab), 4)})
    params |= maybe(rng, 0.3, "stop", rng.sample(STOPS, 2)) | maybe(rng, 0.2, "no_stop_trim", True)
    params |= maybe(rng, 0.2, "stop_token_ids", rng.sample(range(vocab), 20)) | maybe(rng, 0.3, "stream_interval", 1, 3)
    params |= maybe(rng, 0.2, "skip_special_tokens", False)
    fields: dict[str, Any] = {"stream": rng.random() < 0.5}
    if rng.random() < 0.25:
        form, source = rng.choice(FORMS)
        params[form], fields["grammar"] = source, grammar_of(form, source, {})
        fields |= maybe(rng, 0.3, "grammar_after", *(tokenizer.encode(char)[-1] for char in "0123="))
    if rng.random() < 0.4:
        fields |= {"return_logprob": True, "top_logprobs_num": rng.choice((0, 1, 5))}
        fields["logprob_start_len"] = rng.choice((-1, 0, len(ids) // 2))
        fields["token_ids_logprob"] = [3] * rng.randint(0, 1)
    return Request(ids, params, fields)


def settings(rng: random.Random, model: str) -> dict[str, Any]:
    """Small chunks and pools, so that prompts are cut, prefixes evicted and requests retracted."""
    page = 256 if model == V4 else rng.choice((1, 1, 4, 16))
    options: dict[str, Any] = {
        "max_running_requests": rng.choice((1, 2, 3, 5, 8)),
        "max_total_tokens": rng.choice((1024, 2560)) if model == V4 else rng.choice((160, 256, 4096)),
        "chunked_prefill_size": rng.choice((page, 4 * page, -1)) if page > 4 else rng.choice((8, 24, 64, -1)),
        "disable_radix_cache": rng.random() < 0.2,
        "schedule_policy": rng.choice(("fcfs", "lpm")),
        "schedule_conservativeness": rng.choice((1.0, 0.2, 0.0)),
        "overlap": rng.random() < 0.5,
        "piecewise_cuda_graph_tokens": rng.choice(([8], [4, 32], [16, 128])),
    }
    options |= {} if model == V4 else {"page_size": page}
    options |= maybe(rng, 0.3, "max_prefill_tokens", 16, 300) | maybe(rng, 0.3, "context_length", page + 64)
    if model != "deepseek-v2-tiny" and rng.random() < 0.6:
        return options | {"speculative_algorithm": "NEXTN", "speculative_num_steps": rng.choice((1, 2, 3, 5))}
    return options | {"enable_mixed_chunk": rng.random() < 0.4 and options["chunked_prefill_size"] > 0}


class TestRandomWalk(CustomTestCase):
    def test_every_model(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # matrices are small
        for model in ("deepseek-v2-tiny", "deepseek-v3-tiny", "qwen3.5-moe-tiny", V4):
            self.walk(model, WALKS // 2 if model == V4 else WALKS)

    def walk(self, model: str, walks: int) -> None:
        whole = {"chunked_prefill_size": -1, "disable_radix_cache": True, "disable_cuda_graph": True}
        self.plain = TextHarness(model, max_running_requests=1, max_total_tokens=8192, **whole)
        self.met = dict.fromkeys(("answers", "ties", "aborted", "retracted", "cached", "accepted"), 0)
        for number in range(walks):
            rng = random.Random(f"walk/{model}/{number}")
            options, retracts = settings(rng, model), rng.choice((0, 0, 2, 5))
            with self.subTest(model=model, number=number, retracts=retracts, **options), ExitStack() as stack:
                # With overlap it needs a device whose window table is not the host's.
                checks = model != V4 or not options["overlap"]
                stack.enter_context(envs.SGLANG_DEBUG_POOL_CHECK.override(checks))
                if retracts:
                    stack.enter_context(envs.SGLANG_TEST_RETRACT.override(True))
                    stack.enter_context(envs.SGLANG_TEST_RETRACT_INTERVAL.override(retracts))
                self.serve(rng, TextHarness(model, **options))
        self.assertLess(self.met["ties"], 0.01 * self.met["answers"])
        untried = [name for name, count in self.met.items() if not count and name != "ties"]
        self.assertEqual(untried, ["accepted"] if model == "deepseek-v2-tiny" else [])

    def serve(self, rng: random.Random, harness: TextHarness) -> None:
        """Ask at random times, abort some, and flush the cache now and then; at the end compare everything."""
        vocab, most = harness.model_config.vocab_size, harness.scheduler.config.max_req_len
        requests: list[Request] = []
        for question in heldout_questions(12):
            requests.append(a_request(rng, harness.tokenizer, vocab, question.text, requests, min(most - 1, 600)))
        order = [*range(12), *rng.choices(range(12), k=4)]
        rng.shuffle(order)
        asked, aborted = 0, set()
        while asked < len(order) or harness.scheduler.has_work():
            if asked < len(order) and (rng.random() < 0.35 or not harness.scheduler.has_work()):
                ids, params, fields = requests[order[asked]]
                harness.submit(f"r{asked}", ids, SamplingParams.from_request(params), **fields)
                asked += 1
            if asked and rng.random() < 0.04:
                rid = f"r{rng.randrange(asked)}"
                aborted.add(rid)
                harness.inbox.append(AbortReq(rid=rid))
            if rng.random() < 0.05:
                harness.inbox.append(FlushCacheReqInput(seq=0))
            harness.step()
        harness.run()
        metrics, lengths = harness.scheduler.metrics, [len(each.output_ids) for each in harness.results.values()]
        self.assertEqual(metrics.num_generated_tokens, sum(lengths))
        self.met["accepted"] += metrics.num_accepted_drafts
        for number, index in enumerate(order):
            self.compare(harness, f"r{number}", requests[index], most, f"r{number}" in aborted)

    def compare(self, harness: TextHarness, rid: str, request: Request, most: int, aborted: bool) -> None:
        result, answer = harness.results[rid], harness.answer(rid)
        capped = min(request.params["max_new_tokens"], most - len(request.ids))
        alone = self.alone(request, capped)
        self.met["answers"] += 1
        self.met["retracted"] += result.num_retractions > 0
        self.met["cached"] += result.cached_tokens > 0
        assert result.finish_reason is not None
        if aborted and result.finish_reason.type == "abort":
            self.met["aborted"] += 1
            self.assertEqual(answer[0], alone[0][: len(answer[0])], request)
        elif not close(alone, answer):
            # Experts with the same score up to rounding: there is no one answer.
            nudged = [self.alone(request, capped, by) for by in (1e-5, -1e-5)]
            self.assertFalse(all(close(alone, other) for other in nudged), (request, alone, answer))
            self.met["ties"] += 1

    def alone(self, request: Request, max_new_tokens: int, nudge: float = 0.0) -> list[Any]:
        """The answer of the plain engine; the routers' logits may be changed a little."""
        route, noise = topk.topk, torch.Generator().manual_seed(1)

        def nudged(logits: torch.Tensor, *rest: Any) -> Any:
            return route(logits + nudge * torch.randn(logits.shape, generator=noise), *rest)

        for kept in (self.plain.results, self.plain.texts, self.plain.readers):
            kept.clear()
        with mock.patch.object(topk, "topk", nudged if nudge else route):
            params = SamplingParams.from_request({**request.params, "max_new_tokens": max_new_tokens})
            self.plain.submit("x", request.ids, params, **request.fields)
            self.plain.run()
        return self.plain.answer("x")


def close(one: Any, other: Any) -> bool:
    """Equal, log-probabilities to 1e-3."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return one == other or isinstance(one, float) and isinstance(other, float) and abs(one - other) < 1e-3


if __name__ == "__main__":
    unittest.main()
