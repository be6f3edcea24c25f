"""Scheduler, pools and model together against transformers: prefill forms, prefix hits, retraction, mixed batches."""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness, Finished
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS, save_tiny_checkpoint

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
TIE = 2e-4
NEW_TOKENS = 12


def prompts(vocab: int) -> dict[str, list[int]]:
    """Prompts of many lengths, some sharing a long prefix."""
    generator = torch.Generator().manual_seed(5)
    stem = torch.randint(3, vocab, (90,), generator=generator).tolist()
    tail = torch.randint(3, vocab, (80,), generator=generator).tolist()
    return {
        "one": stem[:1],
        "short": tail[:5],
        "stem": stem,
        "stem-cut": stem[:64],
        "stem-fork": stem[:71] + tail[:30],
        "long": tail + stem[40:80],
    }


class ParityCase:
    """One tiny checkpoint and its transformers twin."""

    def __init__(self, name: str, folder: str) -> None:
        self.folder = folder
        self.hf = save_tiny_checkpoint(name, folder)
        self.prompts = prompts(TINY_CONFIGS[name]["vocab_size"])
        self._memo: dict[tuple[int, ...], torch.Tensor] = {}
        self.num_tokens = self.num_ties = 0

    def truth(self, ids: list[int]) -> torch.Tensor:
        """transformers' log-probabilities [len(ids), V] of a full forward."""
        key = tuple(ids)
        if key not in self._memo:
            with torch.inference_mode():
                self._memo[key] = self.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return self._memo[key]

    def check(self, test: unittest.TestCase, rid: str, result: Finished, num_new: int = NEW_TOKENS) -> None:
        """Greedy tokens and all log-probabilities, teacher-forced on the tokens that the engine sampled."""
        prompt = self.prompts[rid.split("@")[0]]
        ids = prompt + result.output_ids
        truth = self.truth(ids)
        test.assertEqual(len(result.output_ids), num_new, rid)
        for offset, token in enumerate(result.output_ids):
            row = truth[len(prompt) - 1 + offset]
            best = row.topk(2)
            self.num_tokens += 1
            if int(best.indices[0]) != token:
                test.assertLess(float(best.values[0] - best.values[1]), TIE, f"{rid}: token {offset} differs")
                self.num_ties += 1
            test.assertAlmostEqual(result.output_logprobs.logprobs[offset], float(row[token]), delta=TOLERANCE)
        scored = result.input_logprobs
        if scored is not None:
            test.assertIsNone(scored.logprobs[0])
            test.assertEqual(scored.ids, prompt)
            for position in range(1, len(prompt)):
                wanted = float(truth[position - 1, prompt[position]])
                test.assertAlmostEqual(scored.logprobs[position], wanted, delta=TOLERANCE, msg=f"{rid} at {position}")


@contextmanager
def nan_in_step(engine: EngineHarness, step: int) -> Iterator[None]:
    """The first row of the ``step``-th forward is NaN where it enters the model."""
    embed = engine.runner.model.model.embed_tokens
    forward, calls = embed.forward, count(1)

    def faulty(ids: torch.Tensor) -> torch.Tensor:
        rows = forward(ids)
        if next(calls) == step:
            rows = rows.clone()
            rows[0] = float("nan")
        return rows

    embed.forward = faulty
    try:
        yield
    finally:
        embed.forward = forward


PARAMS = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)


class TestSchedulerParity(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)  # small products: more threads only wait for one another
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.cases = {name: ParityCase(name, f"{folder}/{name}") for name in TINY_CONFIGS}

    def engine(self, case: ParityCase, **options: Any) -> EngineHarness:
        defaults = {"max_total_tokens": 1024, "max_running_requests": 8, "random_seed": 1}
        return EngineHarness(case.folder, **{**defaults, **options})

    def submit_all(self, engine: EngineHarness, case: ParityCase, suffix: str = "", **fields: Any) -> None:
        for rid, prompt in case.prompts.items():
            engine.submit(rid + suffix, prompt, PARAMS, return_logprob=True, **fields)

    def run_all(self, case: ParityCase, **options: Any) -> EngineHarness:
        engine = self.engine(case, **options)
        self.submit_all(engine, case, logprob_start_len=0)
        for rid, result in engine.run().items():
            case.check(self, rid, result)
        return engine

    def test_prefill_forms(self) -> None:
        for name, case in self.cases.items():
            for options in (
                {"chunked_prefill_size": -1},
                {"chunked_prefill_size": 7},
                {"chunked_prefill_size": 64},
                {"chunked_prefill_size": 64, "page_size": 16, "overlap": True},
                {"chunked_prefill_size": 7, "enable_mixed_chunk": True, "disable_radix_cache": True},
            ):
                with self.subTest(model=name, **options):
                    self.run_all(case, **options)

    def test_prefix_cache_hit(self) -> None:
        for name, case in self.cases.items():
            for page_size in (1, 4):
                with self.subTest(model=name, page_size=page_size):
                    engine = self.run_all(case, page_size=page_size)
                    for round_number in (1, 2):
                        self.submit_all(engine, case, suffix=f"@{round_number}")
                        engine.run()
                    for rid, result in engine.results.items():
                        case.check(self, rid, result)
                    # Hybrids learn in round 1 where a snapshot pays; everyone hits in round 2.
                    hits = [engine.results[f"{rid}@2"].cached_tokens for rid in case.prompts]
                    self.assertGreaterEqual(hits[2], 80, f"no prefix-cache hit: {hits}")
                    self.assertGreaterEqual(hits[4], 64, f"no prefix-cache hit: {hits}")

    def test_after_retraction(self) -> None:
        for name, case in self.cases.items():
            with self.subTest(model=name):
                options = {"max_total_tokens": 200, "schedule_conservativeness": 0.01, "overlap": True}
                engine = self.engine(case, **options)
                params = SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True)
                for copy in "abcd":
                    for rid in ("one", "short"):
                        engine.submit(f"{rid}@{copy}", case.prompts[rid], params, return_logprob=True)
                results = engine.run()
                for rid, result in results.items():
                    case.check(self, rid, result, 40)
                retracted = sum(result.num_retractions for result in results.values())
                self.assertGreater(retracted, 0, "nothing was retracted: the pool is too large for this test")

    def test_penalties_with_and_without_overlap(self) -> None:
        """The same tokens for penalised requests and others in their batch, with any order of steps."""
        edited = {
            "one": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
            "short": {"repetition_penalty": 1.8, "temperature": 0.9, "sampling_seed": 4},
            "stem": {},
            "stem-cut": {"min_new_tokens": 6, "stop_token_ids": list(range(3, 400)), "temperature": 1.2},
            "stem-fork": {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 9},
            "long": {"frequency_penalty": -0.8, "logit_bias": {"7": 4.0}},
        }
        for name in ("dsv3", "q35"):
            case = self.cases[name]
            found: list[dict[str, list[int]]] = []
            for options in ({}, {"overlap": True}, {"overlap": True, "max_running_requests": 3, "page_size": 16}):
                engine = self.engine(case, **options)
                for number, (rid, prompt) in enumerate(case.prompts.items()):
                    fields = {"temperature": 0.0, "max_new_tokens": 14 + number, "ignore_eos": True, **edited[rid]}
                    engine.submit(rid, prompt, SamplingParams(**fields))
                found.append({rid: result.output_ids for rid, result in engine.run().items()})
            with self.subTest(model=name):
                self.assertEqual(found[1:], found[:1] * 2)
                ended = found[0]["stem-cut"]
                self.assertTrue(set(ended[:5]).isdisjoint(range(3, 400)) and 6 <= len(ended) < 17, ended)
                self.assertGreater(len(set(found[0]["one"])), len(found[0]["one"]) // 2)

    def test_a_nan_leaves_nothing_behind(self) -> None:
        """One NaN in one row of one step: at most one request ends, the others and all retries are right."""
        ended = 0
        for name in ("dsv3", "q35moe"):
            case = self.cases[name]
            for options in (
                {"chunked_prefill_size": 32, "page_size": 4, "overlap": True},
                {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
            ):
                for step in (1, 2, 9):
                    with self.subTest(model=name, step=step, **options):
                        engine = self.engine(case, **options)
                        with nan_in_step(engine, step):
                            self.submit_all(engine, case)
                            engine.run()
                        aborted = {rid for rid, r in engine.results.items() if r.finish_reason.type == "abort"}
                        self.assertLessEqual(len(aborted), 1)
                        ended += len(aborted)
                        self.submit_all(engine, case, suffix="@1")
                        for rid, result in engine.run().items():
                            if rid not in aborted:
                                case.check(self, rid, result)
        self.assertGreater(ended, 6)

    def test_zz_ties_are_rare(self) -> None:
        tokens = sum(case.num_tokens for case in self.cases.values())
        ties = sum(case.num_ties for case in self.cases.values())
        print(f"greedy tokens compared: {tokens}, near-ties resolved the other way: {ties}")
        self.assertGreater(tokens, 5000)
        self.assertLess(ties, 0.01 * tokens)


if __name__ == "__main__":
    unittest.main()
