"""Tokens with and without speculation are the same: any number of drafts, any drafter, any schedule."""

import itertools
import unittest

import torch

from sglang.embedded_models import default_model_path
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.drafters import RuleDrafter, rules
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=35, suite="stage-b-test-cpu")

SHARED = "12+34=46 and 7+8=15 and "


def requests():
    """Questions, some after a shared prefix, with every kind of parameter that decides a token."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.05},
        {"temperature": 0.0, "frequency_penalty": 0.6, "presence_penalty": 0.3},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.0, "min_new_tokens": 9},
        {"temperature": 0.0, "max_new_tokens": 1},
        {"temperature": 0.7, "max_new_tokens": 2},
        {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 20},
        {"temperature": 0.9, "logit_bias": {"20": 3.0}},
        {"temperature": 0.0, "stop": ["5"]},
    ]
    questions = heldout_questions()
    texts = [SHARED * (number % 3) + question.text for number, question in enumerate(questions[:22])]
    for number, (text, kind) in enumerate(zip(texts, itertools.cycle(kinds))):
        yield f"r{number}", text, SamplingParams(**{"max_new_tokens": 16, "sampling_seed": number, **kind})


class TestIdentity(CustomTestCase):
    folder = str(default_model_path())

    @classmethod
    def setUpClass(cls):
        cls.tokenizer = Tokenizer.from_path(cls.folder)
        cls.prompts = {rid: cls.tokenizer.encode(text) for rid, text, _ in requests()}
        harness = cls.make(num_steps=0)
        cls.answers = {rid: result.output_ids for rid, result in cls.serve(harness).items()}
        assert any(len(ids) > 8 for ids in cls.answers.values())

    @classmethod
    def make(cls, num_steps, concurrency=7, **server_args):
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps} if num_steps else {}
        return EngineHarness(
            cls.folder,
            with_tokenizer=True,
            max_running_requests=concurrency,
            **{"max_total_tokens": 4096, **spec, **server_args},
        )

    @classmethod
    def serve(cls, harness, abort_at=0):
        for rid, _, params in requests():
            harness.submit(rid, cls.prompts[rid], params)
        for _ in range(abort_at):
            harness.step()
        if abort_at:
            harness.inbox += [AbortReq(rid=rid) for rid in ("r1", "r9", "r16")]
        return harness.run()

    def check(self, rule, num_steps, concurrency=7, abort_at=0, retract=False, **server_args):
        harness = self.make(num_steps, concurrency, **server_args)
        self.watch_overlap(harness)
        drafter = None
        if rule != "model":
            known = rules(self.answers, harness.model_config.vocab_size, harness.model_config.eos_token_ids[0])
            drafter = RuleDrafter(harness.memory, known[rule], num_steps)
            harness.worker.speculator.drafter = drafter
        results = self.serve(harness, abort_at)
        for rid, ids in self.answers.items():
            found = results[rid]
            if found.finish_reason.type == "abort":
                self.assertGreater(abort_at, 0, found.finish_reason)
                self.assertEqual(found.output_ids, ids[: len(found.output_ids)], rid)
                continue
            self.assertEqual(found.output_ids, ids, f"{rid} with {rule} drafts of {num_steps}")
        self.assertEqual(self.num_unknown > 5, server_args.get("overlap", False), self.num_unknown)
        if retract is not None:
            self.assertEqual(any(result.num_retractions for result in results.values()), retract)
        return harness, drafter, results

    def watch_overlap(self, harness):
        """Count the requests of steps launched before the host knew what the last step had given them."""
        self.num_unknown, forward, relay = 0, harness.worker.forward, harness.runner.relay

        def watched(batch):
            if batch.input_ids is None:
                width = batch.kind.rows_per_request
                bounds = torch.tensor(batch.seq_lens) - width
                known = relay.committed[batch.req_pool_indices]
                self.assertTrue(bool((known <= bounds).all()))
                self.num_unknown += int((known < bounds).sum())
            return forward(batch)

        harness.worker.forward = watched

    def test_overlap(self):
        """Steps launched before the last one's tokens are known: stops within accepted tokens, retraction, aborts."""
        for rule, num_steps, options in (
            ("model", 3, {}),
            ("errant", 2, {"abort_at": 5, "page_size": 16}),
        ):
            with self.subTest(rule=rule, num_steps=num_steps, **options):
                self.check(rule, num_steps, overlap=True, **options)
        with envs.SGLANG_TEST_RETRACT.override(True), envs.SGLANG_TEST_RETRACT_INTERVAL.override(3):
            self.check("errant", 3, retract=True, overlap=True)

    def test_drafts_of_the_model_itself(self):
        for num_steps in (1, 3):
            with self.subTest(num_steps=num_steps):
                harness, _, _ = self.check("model", num_steps)
                metrics = harness.scheduler.metrics
                self.assertEqual(metrics.num_drafts, num_steps * metrics.spec_verify_ct)
                self.assertEqual(metrics.num_accepted_drafts, sum(metrics.accepted_by_position))
                self.assertGreater(metrics.accepted_by_position[0], 0.4 * metrics.spec_verify_ct)

    def test_a_draft_writes_to_slots_of_its_own_request(self):
        harness = self.make(3, chunked_prefill_size=7)
        drafter, memory, owners, places = harness.worker.speculator.drafter, harness.memory, {}, {True: 0, False: 0}
        admit, draft_batch = memory.admit, drafter._draft_batch

        def watched_admit(req, match):
            admit(req, match)
            owners[req.req_pool_idx] = req

        def watched_batch(*args):
            forward_batch = draft_batch(*args)
            for row, slot in zip(
                forward_batch.req_pool_indices.tolist(), forward_batch.out_cache_loc.tolist(), strict=True
            ):
                places[slot == 0] += 1
                if row == memory.req_pool.padding_row:
                    self.assertEqual(slot, 0)
                    continue
                mine = memory.req_pool.read(row, 0, owners[row].kv_allocated_len).tolist()
                self.assertIn(slot, mine)
            return forward_batch

        memory.admit, drafter._draft_batch = watched_admit, watched_batch
        self.serve(harness)
        self.assertGreater(places[True], 0, "no chunk ended before its prompt")
        self.assertGreater(places[False], places[True])

    def test_every_rule_and_number_of_drafts(self):
        pairs = [
            ("right", 2),
            ("wrong", 3),
            ("right at the end", 5),
            ("wrong at the end", 3),
            ("ends", 2),
            ("errant", 5),
        ]
        for rule, num_steps in pairs:
            with self.subTest(rule=rule, num_steps=num_steps):
                _, drafter, _ = self.check(rule, num_steps)
                self.assertEqual(drafter.num_accepted > 0, rule in ("right", "wrong at the end", "ends", "errant"))
                self.assertGreater(drafter.num_rejected, 0)
                if rule == "right":
                    self.assertGreater(drafter.num_by_length[num_steps + 1], 0)

    def test_schedules(self):
        for concurrency, chunk, page in ((1, 64, 16), (7, 7, 1), (22, 64, 64)):
            with self.subTest(concurrency=concurrency, chunk=chunk, page=page):
                _, drafter, results = self.check(
                    "errant", 3, concurrency, chunked_prefill_size=chunk - chunk % page or page, page_size=page
                )
                self.assertGreater(drafter.num_accepted, 0)
                self.assertTrue(page > 16 or any(result.cached_tokens for result in results.values()))

    def test_requests_that_are_retracted_or_aborted(self):
        with envs.SGLANG_TEST_RETRACT.override(True), envs.SGLANG_TEST_RETRACT_INTERVAL.override(3):
            self.check("errant", 3, retract=True)
        self.check("right", 2, abort_at=5)

    def test_a_full_pool(self):
        longest = max(map(len, self.prompts.values()))
        _, drafter, _ = self.check("errant", 3, max_total_tokens=longest + 40, disable_radix_cache=True, retract=None)
        self.assertGreater(drafter.num_accepted, 0)

    def test_a_request_up_to_the_context_limit(self):
        prompt = self.prompts["r0"]
        limits = {"context_length": len(prompt) + 8}
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        found = []
        for num_steps in (0, 5):
            harness = self.make(num_steps, **limits)
            harness.submit("r", prompt, params)
            found.append(harness.run()["r"])
        self.assertEqual(len(found[0].output_ids), 8)
        self.assertEqual(found[1].output_ids, found[0].output_ids)

    def test_log_probabilities(self):
        found = []
        for num_steps in (0, 3):
            harness = self.make(num_steps)
            for rid, _, params in list(requests())[:6]:
                harness.submit(
                    rid, self.prompts[rid], params, return_logprob=True, logprob_start_len=2, top_logprobs_num=2
                )
            found.append(harness.run())
        for rid, plain in found[0].items():
            for kind in ("input_logprobs", "output_logprobs"):
                ours, theirs = getattr(found[1][rid], kind), getattr(plain, kind)
                self.assertEqual(ours.ids, theirs.ids)
                self.assertEqual(len(ours.top), len(theirs.top))
                for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                    self.assertTrue(one == other or abs(one - other) < 1e-4, (rid, kind, one, other))


if __name__ == "__main__":
    unittest.main()
