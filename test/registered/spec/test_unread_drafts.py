"""Drafts that nobody would read are not made; tokens, counts, and what the prefix cache holds stay the same."""

import random
import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=12, suite="stage-b-test-cpu")

FOLDER = str(EMBEDDED_MODELS["deepseek-v3-tiny"])


class Watched:
    """An engine that counts its steps, and those after which drafts were made."""

    def __init__(self, num_steps=3, **settings):
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps} if num_steps else {}
        self.engine = EngineHarness(
            FOLDER,
            with_tokenizer=True,
            max_total_tokens=1024,
            max_running_requests=4,
            dtype="float32",
            **spec,
            **settings,
        )
        self.num_steps, self.proposals = 0, []
        if num_steps:
            drafter = self.engine.worker.speculator.drafter
            follow, propose = drafter.follow, drafter.propose

            def followed(*args):
                self.num_steps += 1
                return follow(*args)

            def proposed(*args):
                self.proposals.append(propose(*args))
                return self.proposals[-1]

            drafter.follow, drafter.propose = followed, proposed

    def serve(self, *requests):
        """Ids of each (prompt, parameters), served at once."""
        self.num_steps, self.proposals = 0, []
        for number, (prompt, params) in enumerate(requests):
            self.engine.submit(str(number), prompt, SamplingParams(**{"temperature": 0.0, **params}))
        self.engine.results.clear()
        results = self.engine.run()
        return [results[str(number)].output_ids for number in range(len(requests))]


class TestUnreadDrafts(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # of many small operations
        tokenizer = Tokenizer.from_path(FOLDER)
        asked = [question for question in heldout_questions() if len(question.answer) == 6][:3]
        cls.prompts = [tokenizer.encode(question.text) for question in asked]

    def test_no_drafts_after_the_last_step(self):
        a, b, _ = self.prompts
        cases = {
            "stop id": [(a, {"max_new_tokens": 16})],
            "limit": [(a, {"max_new_tokens": 5, "ignore_eos": True})],
            "two": [(a, {"max_new_tokens": 2}), (b, {"max_new_tokens": 16})],
        }
        for overlap in (False, True):
            plain, watched = Watched(0), Watched(overlap=overlap)
            for name, requests in cases.items():
                with self.subTest(name, overlap=overlap):
                    self.assertEqual(watched.serve(*requests), plain.serve(*requests))
                    made = len(watched.proposals)
                    self.assertGreater(made, 0)
                    # With overlap the next step is in flight when a stop id is found; a limit is known before it.
                    unread = 2 if overlap and name != "limit" else 1
                    self.assertEqual(watched.num_steps - made, unread)

    def test_one_token_is_answered_without_drafts(self):
        watched = Watched()
        watched.serve(*[(prompt, {"max_new_tokens": 1}) for prompt in self.prompts])
        self.assertEqual((watched.num_steps, len(watched.proposals)), (1, 0))
        metrics = watched.engine.scheduler.metrics
        self.assertEqual((metrics.num_drafts, metrics.spec_verify_ct), (0, 0))

    def test_counts_are_those_of_verified_drafts(self):
        watched = Watched()
        watched.serve(*[(prompt, {"max_new_tokens": 16}) for prompt in self.prompts])
        metrics = watched.engine.scheduler.metrics
        self.assertEqual(metrics.num_drafts, 3 * metrics.spec_verify_ct)
        self.assertEqual(metrics.num_accepted_drafts, sum(metrics.accepted_by_position))
        self.assertGreater(metrics.num_accepted_drafts, 0)

    def test_a_chunk_before_the_end_of_a_prompt_makes_none(self):
        watched = Watched(chunked_prefill_size=4)
        watched.serve((self.prompts[0], {"max_new_tokens": 1}))
        self.assertEqual((watched.num_steps, len(watched.proposals)), (-(-len(self.prompts[0]) // 4), 0))

    def test_the_prefix_cache_has_the_layers_rows_of_the_whole_answer(self):
        """Also of the last step, after which no drafts were made: rows equal those of a prompt with the same tokens."""
        watched = Watched()
        for prompt in self.prompts:
            with self.subTest(prompt=prompt):
                (answer,) = watched.serve((prompt, {"max_new_tokens": 12, "ignore_eos": True}))
                turn = [*prompt, *answer, *self.prompts[0]]
                rows, cached = self.layer_rows(watched.engine, turn)
                self.assertEqual(cached, len(prompt) + 11)
                wanted, _ = self.layer_rows(Watched().engine, turn)
                torch.testing.assert_close(rows[:cached], wanted[:cached], atol=1e-4, rtol=1e-4)

    def layer_rows(self, engine, prompt):
        """The draft layer's latent rows of the prompt, and how many of them were cached before."""
        engine.submit("turn", prompt, SamplingParams(temperature=0.0, max_new_tokens=9, ignore_eos=True))
        engine.step()
        (req,) = engine.scheduler.running_reqs
        slots = engine.memory.req_pool.read(req.req_pool_idx, 0, len(prompt))
        rows = engine.runner.pools["latent"].layer(engine.model_config.num_hidden_layers)[0][slots].clone()
        engine.run()
        return rows, req.cached_tokens

    def test_a_request_ends_where_the_stop_checker_ends_it(self):
        chance, checker, found = random.Random(0), StopChecker(None), []
        for _ in range(2000):
            params = SamplingParams(max_new_tokens=chance.randint(1, 8), min_new_tokens=chance.randint(0, 5))
            req = Req(TokenizedGenerateReqInput(rid="", input_ids=[1], sampling_params=params), 0, frozenset({0, 7}))
            req.output_ids = [1] * chance.randint(0, req.max_new_tokens - 1)
            ids = [chance.randint(0, 9) for _ in range(chance.randint(1, 4))]
            found.append(req.ends_with(ids))
            reasons = []
            for token in ids:
                req.output_ids.append(token)
                reasons.append(checker.check(req))
            self.assertEqual(found[-1], any(reason is not None for reason in reasons), (req.output_ids, ids, params))
        self.assertTrue(200 < sum(found) < 1800)


if __name__ == "__main__":
    unittest.main()
