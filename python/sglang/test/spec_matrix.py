"""Speculation over every schedule: what a request is given, and what must have happened while it was served."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import TestCase

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.drafters import RuleDrafter, rules
from sglang.test.engine_harness import EngineHarness, Finished
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

# The layer itself, and the rules of ``drafters``.
MODEL = "model"
RULES = (MODEL, "right", "wrong", "right at the end", "wrong at the end", "ends", "errant")
SHARED = "12+34=46 and 7+8=15 and "
ABORTED = ("r0", "r3")


class SpecCase(NamedTuple):
    """One schedule. ``hits``: with the prefix cache; ``warm``: at temperature 0.7 and top-p 0.9, seeded."""

    num_steps: int
    rule: str
    concurrency: int
    chunk: int
    hits: bool
    retracts: bool
    aborts: bool
    warm: bool
    overlap: bool


def all_cases() -> list[SpecCase]:
    """Every combination, except retraction of the only request, which is impossible."""
    both = (False, True)
    values = itertools.product((1, 2, 3, 5), RULES, (1, 7), (7, 64), both, both, both, both, both)
    return [case for case in itertools.starmap(SpecCase, values) if case.concurrency > 1 or not case.retracts]


def nightly_cases() -> list[SpecCase]:
    """Every combination of all but overlap, which is on in every second of them, as often next to each other value."""
    return [case for case in all_cases() if case.overlap == bool(sum(case[4:8]) % 2)]


def covering(cases: Sequence[SpecCase]) -> list[SpecCase]:
    """A few of ``cases`` in which every two values meet that meet in any of them, by greedy choice."""

    def pairs(case: SpecCase) -> set[tuple[tuple[int, object], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


class EverySchedule(CustomTestCase):
    """Every combination of settings, for the embedded model that a subclass names."""

    model = ""

    def test_every_combination(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # matrices are small
        matrix = SpecMatrix(str(EMBEDDED_MODELS[self.model]))
        for case in nightly_cases():
            with self.subTest(case):
                matrix.check(self, case)


class SpecMatrix:
    """A model's answers without speculation, and the same requests under a case.

    Requests come in two waves: questions, some after a shared beginning, and then what follows some of their answers.
    shared: that beginning, at least a page where the model has pages; it stands once or twice. max_total_tokens: room
    for seven requests. page: by which the model is chunked and hit.
    """

    def __init__(self, folder: str, shared: str = SHARED, max_total_tokens: int = 2048, page: int = 1) -> None:
        self.folder, self._max_total_tokens, self._page = folder, max_total_tokens, page
        tokenizer = Tokenizer.from_path(folder)
        texts = [question.text for question in heldout_questions()[:7]]
        self.first = {f"r{i}": tokenizer.encode(shared * (i % 3) + text) for i, text in enumerate(texts[:5])}
        self._next = {f"s{i}": (f"r{i}", tokenizer.encode(" and " + text)) for i, text in enumerate(texts[5:])}
        self.second: dict[bool, dict[str, list[int]]] = {}
        self.answers: dict[bool, dict[str, list[int]]] = {}
        for warm in (False, True):
            harness = EngineHarness(
                folder, with_tokenizer=True, max_running_requests=7, max_total_tokens=max_total_tokens
            )
            answers = self._serve_wave(harness, self.first, warm)
            self.second[warm] = {
                rid: self.first[before] + answers[before].output_ids + more
                for rid, (before, more) in self._next.items()
            }
            answers = self._serve_wave(harness, self.second[warm], warm)
            self.answers[warm] = {rid: result.output_ids for rid, result in answers.items()}

    @staticmethod
    def _serve_wave(
        harness: EngineHarness, prompts: dict[str, list[int]], warm: bool, aborted: Sequence[str] = ()
    ) -> dict[str, Finished]:
        drawn: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9} if warm else {"temperature": 0.0}
        for seed, (rid, prompt) in enumerate(prompts.items()):
            goes_on = rid in ("r1", "r4")
            params = SamplingParams(
                max_new_tokens=13 if goes_on else 7, ignore_eos=goes_on, sampling_seed=seed, **drawn
            )
            harness.submit(rid, prompt, params)
        if aborted:
            while not harness.scheduler.running_reqs:
                harness.step()
            harness.step()
            harness.inbox += [AbortReq(rid=rid) for rid in aborted]
        return harness.run()

    def check(self, test: TestCase, case: SpecCase) -> None:
        """Serve the requests under ``case``: the same tokens, and what the case is about has happened."""
        answers = self.answers[case.warm]
        with ExitStack() as stack:
            if case.retracts:
                stack.enter_context(envs.SGLANG_TEST_RETRACT.override(True))
                stack.enter_context(envs.SGLANG_TEST_RETRACT_INTERVAL.override(2))
            harness = EngineHarness(
                self.folder,
                with_tokenizer=True,
                overlap=case.overlap,
                speculative_algorithm="NEXTN",
                speculative_num_steps=case.num_steps,
                max_running_requests=case.concurrency,
                chunked_prefill_size=case.chunk if self._page == 1 else self._page * (1 + (case.chunk > 7)),
                disable_radix_cache=not case.hits,
                max_total_tokens=self._max_total_tokens,
            )
        if case.rule != MODEL:
            known = rules(answers, harness.model_config.vocab_size, harness.model_config.eos_token_ids[0])
            assert harness.worker.speculator is not None
            harness.worker.speculator.drafter = RuleDrafter(harness.memory, known[case.rule], case.num_steps)
        self._serve_wave(harness, self.first, case.warm, ABORTED if case.aborts else ())
        results = self._serve_wave(harness, self.second[case.warm], case.warm)
        for rid, ids in answers.items():
            found = results[rid]
            assert found.finish_reason is not None
            if found.finish_reason.type == "abort":
                test.assertTrue(case.aborts and rid in ABORTED, (case, rid, found.finish_reason))
                test.assertEqual(found.output_ids, ids[: len(found.output_ids)], (case, rid))
            else:
                test.assertEqual(found.output_ids, ids, (case, rid))
        self._check_events(test, case, harness, results)

    def _check_events(
        self, test: TestCase, case: SpecCase, harness: EngineHarness, results: dict[str, Finished]
    ) -> None:
        reasons = [result.finish_reason for result in results.values()]
        ended = [reason for reason in reasons if reason is not None and reason.type == "abort"]
        test.assertEqual(bool(ended), case.aborts, case)
        test.assertEqual(any(result.cached_tokens for result in results.values()), case.hits, case)
        test.assertEqual(any(result.num_retractions for result in results.values()), case.retracts, case)
        metrics = harness.scheduler.metrics
        first = {"wrong": False, "wrong at the end": case.num_steps > 1, "right at the end": case.num_steps == 1}
        test.assertEqual(metrics.num_accepted_drafts > 0, first.get(case.rule, True), case)
        test.assertGreater(metrics.num_drafts, metrics.num_accepted_drafts, case)
