"""Grammars in the scheduler, on the embedded model: sampling under a mask, other requests, retraction, limits, ends."""

import json
import re
import unittest
from unittest import mock

import jsonschema
import torch

import sglang
from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.environ import envs
from sglang.srt.managers import grammar_manager
from sglang.srt.managers.grammar_manager import GrammarManager
from sglang.srt.managers.io_struct import AbortReq, GrammarReady
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-b-test-cpu")

MODEL = f"{sglang.__path__[0]}/embedded_models/qwen3.5-moe-tiny"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["é€😀"]}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMS = {
    "word": ("regex", "[a-z]{3,9}-[0-9]{2,4}"),
    "json": ("json_schema", json.dumps(SCHEMA)),
    "choice": ("ebnf", 'root ::= "yes" | "no" | "é€"'),
}
TEXTS = ("27+58=", "rev:abcd=", "sort:3142=", "a=3,c=7;c?")


class GrammarCase(CustomTestCase):
    harness = None  # one for all classes

    @classmethod
    def setUpClass(cls):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for products this small, others only cost
        cls.addClassCleanup(torch.set_num_threads, threads)
        if GrammarCase.harness is None:
            GrammarCase.harness = EngineHarness(MODEL, with_tokenizer=True, overlap=True, max_running_requests=6)
        cls.tokenizer = cls.harness.scheduler.stop_checker._tokenizer
        cls.vocab_size = cls.harness.model_config.vocab_size
        cls.eos = cls.harness.model_config.eos_token_ids[0]

    def setUp(self):
        self.harness.results.clear()
        self.harness.scheduler.config.__dict__["enable_overlap"] = True

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, result):
        return self.tokenizer.decode([i for i in result.output_ids if i != self.eos], skip_special_tokens=False)

    def submit(self, rid, form=None, text=TEXTS[0], grammar_after=None, harness=None, fields=None, **params):
        options = {"max_new_tokens": 60 if form else 8, "temperature": 1.0, "sampling_seed": 3, **params}
        grammar = None if form is None else grammar_of(*FORMS.get(form, form), {"whitespace_flexible": False})
        (harness or self.harness).submit(
            rid,
            self.encode(text),
            SamplingParams(**options),
            grammar=grammar,
            grammar_after=grammar_after,
            **(fields or {}),
        )

    def submit_all(self, harness=None):
        """Nine requests, every second one with a grammar, more than run at once."""
        for number in range(9):
            form = ("word", None, "json", None, "choice", None)[number % 6]
            greedy = {"temperature": 0.0} if number % 4 < 2 else {"temperature": 1.3, "top_p": 0.9}
            self.submit(str(number), form, TEXTS[number % 4], harness=harness, sampling_seed=number, **greedy)

    def check_all(self, results):
        for number in range(0, 9, 2):
            text = self.text(results[str(number)])
            self.assertEqual(results[str(number)].finish_reason.type, "stop", text)
            if number % 6 == 0:
                self.assertTrue(re.fullmatch(FORMS["word"][1], text), text)
            elif number % 6 == 2:
                jsonschema.validate(json.loads(text), SCHEMA)
            else:
                self.assertIn(text, ("yes", "no", "é€"))

    def ids(self, results):
        return {rid: result.output_ids for rid, result in results.items()}


class TestDraws(GrammarCase):
    def test_the_likeliest_token_that_leads_to_a_member(self):
        """Greedy, against a choice by hand among all tokens by the model's own log-probabilities."""
        members = [text.encode() for text in ("85", "8é", "rest", "reset", "r€", "rest!", "")]
        pattern = "85|8é|rest!?|reset|r€|"
        for text in TEXTS[:2]:
            fields = {"return_logprob": True, "token_ids_logprob": list(range(self.vocab_size))}
            self.submit(text, ("regex", pattern), text, fields=fields, temperature=0.0)
        for rid, result in self.harness.run().items():
            said = b""
            for token_id, chosen in zip(result.output_ids, result.output_logprobs.chosen, strict=True):
                logprobs = {i: logprob for logprob, i in chosen}
                leads = {
                    i: said + self.tokenizer.token_bytes(i)
                    for i in range(self.vocab_size)
                    if i not in self.tokenizer.all_special_ids and self.tokenizer.token_bytes(i)
                }
                able = [i for i, longer in leads.items() if any(member.startswith(longer) for member in members)]
                able += [self.eos] * (said in members)
                self.assertEqual(token_id, max(able, key=logprobs.__getitem__), (rid, said))
                self.assertAlmostEqual(sum(2.718281828**x for x in logprobs.values()), 1, 4)
                said += b"" if token_id == self.eos else self.tokenizer.token_bytes(token_id)
            self.assertIn(said, members)

    def test_neighbours_do_not_notice_and_overlap_changes_nothing(self):
        self.submit_all()
        together = dict(self.harness.run())
        self.check_all(together)
        self.harness.results = {}
        for number in range(1, 9, 2):
            greedy = {"temperature": 0.0} if number % 4 < 2 else {"temperature": 1.3, "top_p": 0.9}
            self.submit(str(number), None, TEXTS[number % 4], sampling_seed=number, **greedy)
        alone = self.ids(self.harness.run())
        self.assertEqual({rid: self.ids(together)[rid] for rid in alone}, alone)
        plain = EngineHarness(MODEL, with_tokenizer=True, max_running_requests=6, chunked_prefill_size=4)
        self.submit_all(plain)
        self.assertEqual(self.ids(plain.run()), self.ids(together))

    def test_retraction(self):
        self.submit_all()
        want = self.ids(self.harness.run())
        with envs.SGLANG_TEST_RETRACT.override(True), envs.SGLANG_TEST_RETRACT_INTERVAL.override(4):
            often = EngineHarness(MODEL, with_tokenizer=True, overlap=True, max_running_requests=6)
        self.submit_all(often)
        results = often.run()
        self.assertEqual(self.ids(results), want)
        self.assertTrue(any(results[str(number)].num_retractions for number in range(0, 9, 2)))

    def test_beside_penalties_and_biases(self):
        biased = {str(i): 4.0 for i in self.encode("q")}
        self.submit("a", ("regex", "[a-z]{9}"), temperature=0.0, logit_bias=biased)
        self.submit("b", ("regex", "[a-z]{9}"), temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
        results = self.harness.run()
        self.assertGreater(self.text(results["a"]).count("q"), 2)
        self.assertGreater(len(set(self.text(results["b"]))), 6)


class TestEnds(GrammarCase):
    def reason(self, rid):
        reason = self.harness.results[rid].finish_reason
        return reason.type, reason.matched, self.text(self.harness.results[rid])

    def test_ends(self):
        self.submit("complete", ("regex", "abc"))
        self.submit("at the limit", ("regex", "abc"), max_new_tokens=3)
        self.submit("cut", ("regex", "abc"), max_new_tokens=2)
        self.submit("ignored end", ("regex", "abc|abd"), ignore_eos=True)
        self.submit("longer", ("regex", "ab*"), min_new_tokens=7, max_new_tokens=20, temperature=0.0)
        self.submit("cannot be longer", ("regex", "ab"), min_new_tokens=7, max_new_tokens=20)
        self.submit("empty", ("regex", ""))
        self.submit("stop string", ("regex", "x[0-9]+y"), stop=["xy", "x"])
        self.submit("stop token", ("regex", "abc"), stop_token_ids=self.encode("b"))
        self.harness.run()
        self.assertEqual(self.reason("complete"), ("stop", None, "abc"))
        self.assertEqual(self.reason("at the limit"), ("stop", None, "abc"))
        self.assertEqual(self.reason("cut"), ("length", None, "ab"))
        self.assertEqual(self.reason("ignored end")[:2], ("stop", None))
        self.assertRegex(self.reason("longer")[2], "^ab{6,}")
        self.assertEqual(self.reason("cannot be longer"), ("stop", None, "ab"))
        self.assertEqual(self.reason("empty"), ("stop", self.eos, ""))
        self.assertEqual(self.reason("stop string"), ("stop", "x", "x"))
        self.assertEqual(self.reason("stop token"), ("stop", self.encode("b")[0], "ab"))

    def test_behind_a_token(self):
        """The grammar begins after the token that ends a thought; here the model generates that token itself."""
        self.submit("free", None, temperature=0.0)
        free = list(self.harness.run()["free"].output_ids)
        self.submit("held", ("regex", "[a-z]{4}"), temperature=0.0, grammar_after=free[1])
        held = self.harness.run()["held"].output_ids
        self.assertEqual(held[:2], free[:2])
        self.assertRegex(self.tokenizer.decode(held[2:6]), "^[a-z]{4}$")

    def test_what_the_vocabulary_or_the_edits_leave_nothing_of(self):
        self.submit("banned", ("regex", "a+"), stop_token_ids=self.encode("a"), min_new_tokens=2)
        self.submit("fine", "word")
        results = self.harness.run()
        self.assertEqual(
            (results["banned"].finish_reason.type, results["banned"].finish_reason.status_code), ("abort", 400)
        )
        self.assertEqual(results["fine"].finish_reason.type, "stop")

    def test_a_grammar_that_cannot_go_on_ends_its_request_alone(self):
        self.submit("broken", "word")
        self.submit("fine", "word")
        self.harness.step()
        broken = next(req for req in self.harness.scheduler.running_reqs if req.rid == "broken")
        broken.grammar.matcher.consume_token(self.encode("!")[0])
        results = self.harness.run()
        self.assertEqual(
            (results["broken"].finish_reason.type, results["broken"].finish_reason.status_code), ("abort", 400)
        )
        self.assertIn("cannot be followed", results["broken"].finish_reason.message)
        self.assertEqual(results["fine"].finish_reason.type, "stop")

    def test_a_constraint_that_holds_up_the_others_is_told_once(self):
        for limit, told in ((0.0, ["a", "b"]), (1000.0, [])):
            with mock.patch.object(grammar_manager, "SLOW_S", limit), self.assertLogs("sglang", "WARNING") as logs:
                grammar_manager.logger.warning("-")
                self.submit("a", "word")
                self.submit("b", "json")
                self.submit("c")
                self.harness.run()
            self.assertEqual(sorted(record.args[0] for record in logs.records if record.args), told)


class TestHeldBack(GrammarCase):
    """Compiled by another thread, as in a server: requests wait only for their own grammar."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(grammar_manager, "MAX_COMPILED", 3))
        scheduler = self.harness.scheduler
        self.ready, before = [], scheduler.grammars
        scheduler.grammars = GrammarManager(before._backend, self.ready.append)
        self.addCleanup(setattr, scheduler, "grammars", before)

    def announce(self):
        self.harness.scheduler.grammars._thread.submit(int).result()  # after all that was asked for
        self.harness.inbox += [GrammarReady(rid=rid) for rid in self.ready]
        self.ready.clear()

    def test_others_go_on_and_an_abort_counts(self):
        for number in range(5):
            self.submit(f"r{number}", ("regex", f"a{{{number + 1}}}"))
        self.submit("same", ("regex", "a{1}"))
        self.submit("free", None, temperature=0.0)
        results = self.harness.run()
        self.assertEqual(set(results), {"free"})
        self.assertEqual(self.harness.scheduler.load()["num_queue_reqs"], 6)
        self.harness.inbox.append(AbortReq(rid="r3"))
        self.harness.run()
        self.assertEqual(self.harness.results["r3"].finish_reason.type, "abort")
        self.announce()
        results = self.harness.run()
        self.assertEqual(len(results), 7)
        self.assertEqual(self.text(results["r4"]), "a" * 5)
        self.assertEqual(self.text(results["same"]), "a")
        grammars = self.harness.scheduler.grammars
        self.assertEqual((grammars._compiled.cache_info().currsize, grammars._awaited, grammars.pending), (3, {}, []))

    def test_refusals(self):
        self.harness.submit("bad", [5], SamplingParams(), grammar="start: nothing")
        self.harness.run()
        self.announce()
        self.harness.run()
        self.harness.scheduler.grammars = GrammarManager("there is none")
        self.submit("none", "word")
        results = self.harness.run()
        for rid, said in (("bad", "nothing"), ("none", "there is none")):
            reason = results[rid].finish_reason
            self.assertEqual((reason.type, reason.status_code), ("abort", 400))
            self.assertIn(said, reason.message)


if __name__ == "__main__":
    unittest.main()
