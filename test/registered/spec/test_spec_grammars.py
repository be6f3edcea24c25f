"""Constrained output is the same with and without speculation, whatever is drafted, and ends with its grammar."""

import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import GuidanceBackend, grammar_of
from sglang.srt.environ import envs
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.drafters import RuleDrafter, rules
from sglang.test.engine_harness import EngineHarness
from sglang.test.spec_grammar_cases import has_form, serve_forms
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

MODELS = ("qwen3.5-moe-tiny", "deepseek-v3-tiny")


class SpecGrammarCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for products this small, others only cost
        cls.addClassCleanup(torch.set_num_threads, threads)
        cls.folders = {name: str(EMBEDDED_MODELS[name]) for name in MODELS}
        cls.tokenizer = Tokenizer.from_path(cls.folders[MODELS[0]])
        cls.vocab_size = cls.engine(MODELS[0]).model_config.vocab_size
        cls.answers = {name: cls.ids(cls.serve(cls.engine(name))) for name in MODELS}

    @classmethod
    def engine(cls, name, **settings):
        options = {"max_running_requests": 6, "max_total_tokens": 1024, "random_seed": 1, "chunked_prefill_size": 7}
        return EngineHarness(cls.folders[name], with_tokenizer=True, **{**options, **settings})

    @classmethod
    def speculating(cls, name, num_steps, rule=None, **settings):
        engine = cls.engine(name, speculative_algorithm="NEXTN", speculative_num_steps=num_steps, **settings)
        if rule is not None:
            engine.worker.speculator.drafter = RuleDrafter(engine.memory, rule, num_steps)
        return engine

    @classmethod
    def serve(cls, engine):
        return serve_forms(engine, cls.tokenizer)

    @staticmethod
    def ids(results):
        return {rid: result.output_ids for rid, result in results.items()}

    def text(self, ids):
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.eos_token_ids], False)


class TestSameTokens(SpecGrammarCase):
    def test_outputs_have_their_form(self):
        for answers in self.answers.values():
            for rid, ids in answers.items():
                self.assertTrue(has_form(rid, self.text(ids)), (rid, self.text(ids)))

    def test_drafts_of_the_model(self):
        for name in MODELS:
            for num_steps, overlap in ((1, True), (3, False), (3, True), (5, True)):
                with self.subTest(name, num_steps=num_steps, overlap=overlap):
                    engine = self.speculating(name, num_steps, overlap=overlap)
                    self.assertEqual(self.ids(self.serve(engine)), self.answers[name])
                    self.assertGreater(engine.scheduler.metrics.num_accepted_drafts, 0)

    def test_drafts_that_are_right_wrong_and_out_of_the_form(self):
        name = MODELS[0]
        answers = self.answers[name]
        known = rules(answers, self.vocab_size, self.tokenizer.eos_token_ids[0])
        for rule in ("right", "wrong", "right at the end", "wrong at the end", "ends", "errant"):
            for num_steps in (2, 5):
                with self.subTest(rule, num_steps=num_steps):
                    engine = self.speculating(name, num_steps, known[rule], overlap=num_steps == 5)
                    results = self.serve(engine)
                    self.assertEqual(self.ids(results), answers)
                    drafter = engine.worker.speculator.drafter
                    if rule == "right":  # every step of a request but its last gives all that it can
                        self.assertGreater(drafter.num_by_length[num_steps + 1], 10)
                    reasons = {rid: result.finish_reason for rid, result in results.items()}
                    for rid, reason in reasons.items():
                        if not rid.startswith("free"):
                            self.assertEqual(reason.type, "stop", rid)

    def test_a_form_that_ends_inside_the_path_ends_the_request_there(self):
        """The grammar allows two tokens; the drafts continue with the model's output without a grammar."""
        name = MODELS[0]
        known = rules(self.answers[name], self.vocab_size, self.tokenizer.eos_token_ids[0])

        def right_and_on(req, tokens, n):
            return [i or 5 for i in known["right"](req, tokens, n)]

        engine = self.speculating(name, 5, right_and_on)
        results = self.serve(engine)
        for rid, result in results.items():
            if rid.startswith("short"):
                self.assertEqual(self.text(result.output_ids), "ab")
                self.assertEqual(result.finish_reason.type, "stop")

    def test_retraction(self):
        with envs.SGLANG_TEST_RETRACT.override(True), envs.SGLANG_TEST_RETRACT_INTERVAL.override(3):
            engine = self.speculating(MODELS[0], 3, overlap=True)
        results = self.serve(engine)
        self.assertEqual(self.ids(results), self.answers[MODELS[0]])
        self.assertTrue(any(result.num_retractions for rid, result in results.items() if not rid.startswith("free")))

    def test_behind_a_token_that_is_a_draft(self):
        """The grammar begins after the second token; the path contains that token and others before and after it."""
        name = MODELS[0]
        prompt = self.tokenizer.encode("27+58=")

        def answer(engine, after=None):
            grammar = grammar_of("regex", "[a-z]{4}", {})
            fields = {} if after is None else {"grammar": grammar, "grammar_after": after}
            engine.submit("r", prompt, SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True), **fields)
            return engine.run().pop("r").output_ids

        free = answer(self.engine(name))
        held = answer(self.engine(name), free[1])
        self.assertEqual(held[:2], free[:2])
        self.assertRegex(self.text(held[2:]), "^[a-z]{4}$")
        right = rules({"r": held}, self.vocab_size, self.tokenizer.eos_token_ids[0])["right"]
        for rule in (None, right):
            engine = self.speculating(name, 5, rule)
            self.assertEqual(answer(engine, free[1]), held)


class TestAlongDrafts(CustomTestCase):
    """Masks along a path, compared with new grammars that have accepted each prefix of it."""

    def test_each_row_is_that_of_its_beginning(self):
        tokenizer = Tokenizer.from_path(str(EMBEDDED_MODELS[MODELS[0]]))
        eos = tokenizer.eos_token_ids[0]
        backend = GuidanceBackend(tokenizer.to_json(), 512, [eos])
        ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        cases = [  # a pattern, what was said, drafts, and how many rows can give a token
            ("[a-z]+-[0-9]+", ids("ab"), ids("c-1"), 4),
            ("[a-z]+-[0-9]", ids("ab"), ids("c-1"), 3),  # complete
            ("[a-z]+-[0-9]+", ids("ab"), [*ids("c-"), eos], 3),  # the end, where it may not be
            ("[a-z]+-[0-9]+", ids("ab-1"), [*ids("2"), eos, *ids("2")], 2),  # the end, after which nothing is
            ("[a-z]+-[0-9]+", ids("ab"), ids("!!!"), 1),
            ("ab", [], ids("abc"), 2),
        ]
        width = 4
        grammars = [backend.compile(grammar_of("regex", pattern, {})).copy(None) for pattern, *_ in cases]
        for grammar, (_, before, *_) in zip(grammars, cases, strict=True):
            grammar.follow(before)
        mask = torch.full((width * len(cases), backend.num_words), -1, dtype=torch.int32)
        rows = [(grammar, index * width) for index, grammar in enumerate(grammars)]
        for _ in range(2):  # a second time as the first: rejected drafts are forgotten
            mask.fill_(-1)
            backend.fill_along(rows, [drafts for _, _, drafts, _ in cases], mask)
            for index, (pattern, before, drafts, num_rows) in enumerate(cases):
                for number in range(width):
                    alone = backend.compile(grammar_of("regex", pattern, {})).copy(None)
                    alone.follow([*before, *drafts[:number]])
                    want = torch.full((1, backend.num_words), -1, dtype=torch.int32)
                    if number < num_rows:
                        backend.fill([(alone, 0)], want)
                    self.assertTrue(torch.equal(mask[index * width + number], want[0]), (pattern, drafts, number))


if __name__ == "__main__":
    unittest.main()
