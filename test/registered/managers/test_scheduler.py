"""The scheduler under random traffic and at its limits, with a model whose "KV" is the token itself."""

from __future__ import annotations

import random
import unittest
from dataclasses import replace
from typing import Any
from unittest import mock

from sglang.srt.managers.io_struct import (
    AbortReq,
    FlushCacheReqInput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ShutdownReq,
)
from sglang.srt.managers.req_memory import PoolLeakError
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scheduler_fakes import (
    BAD,
    VOCAB,
    FakeForward,
    FakeStep,
    Setup,
    expected_output,
    make,
    random_traffic,
    request,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")


class TestRandomTraffic(CustomTestCase):
    """Random arrivals with shared prefixes, on pools that overflow; outputs must be those of each request alone."""

    def test_all_modes(self) -> None:
        modes = [
            {},
            {"page": 4},
            {"page": 16, "chunk": 32},
            {"radix": False},
            {"chunk": None},
            {"policy": "lpm"},
            {"mixed": True},
            {"mixed": True, "page": 4},
            {"hybrid": True},
            {"hybrid": True, "page": 4},
            {"hybrid": True, "state_slots": 8},
            {"hybrid": True, "radix": False},
            {"hybrid": True, "chunk": None, "mixed": True},
            {"overlap": True},
            {"overlap": True, "page": 4, "hybrid": True},
            {"overlap": True, "mixed": True},
            {"width": 3},
            {"width": 4, "page": 4, "overlap": True},
        ]
        for mode in modes:
            for seed in range(6):
                with self.subTest(mode=mode, seed=seed):
                    random_traffic(self, seed, **mode)

    def test_tight_pool_retracts_and_stays_right(self) -> None:
        retracted = 0
        for hybrid in (False, True):
            for page in (1, 4):
                for seed in range(6):
                    with self.subTest(hybrid=hybrid, page=page, seed=seed):
                        options = {"hybrid": hybrid, "page": page, "mixed": seed % 2 == 1, "overlap": seed % 3 > 0}
                        setup = random_traffic(self, seed, pool=160, conservativeness=0.05, **options)
                        retracted += setup.scheduler.metrics.num_retracted_reqs
        self.assertGreater(retracted, 20)

    def test_tight_pool_with_several_tokens_per_step(self) -> None:
        retracted = 0
        for page in (1, 4):
            for seed in range(3):
                with self.subTest(page=page, seed=seed):
                    setup = random_traffic(
                        self, seed, pool=96, conservativeness=0.05, page=page, width=4, overlap=seed > 0
                    )
                    retracted += setup.scheduler.metrics.num_retracted_reqs
        self.assertGreater(retracted, 2)

    def test_forced_retraction(self) -> None:
        for overlap in (False, True):
            setup = random_traffic(self, 3, retract_interval=3, overlap=overlap)
            self.assertGreater(setup.scheduler.metrics.num_retracted_reqs, 5)


class TestPrefixCache(CustomTestCase):
    def test_second_prompt_hits(self) -> None:
        setup = make(chunk=None)
        prompt = list(range(1, 41))
        setup.channel.inbox.append(request("a", prompt))
        setup.run()
        setup.channel.inbox.append(request("b", prompt))
        setup.run()
        self.assertEqual(setup.channel.cached["b"], 39)
        self.assertEqual(setup.channel.outputs["a"], setup.channel.outputs["b"])

    def test_hybrid_learns_where_to_snapshot(self) -> None:
        setup = make(chunk=None, hybrid=True)
        prompt = list(range(1, 41))
        for rid in "abc":
            setup.channel.inbox.append(request(rid, prompt))
            setup.run()
        # The first run leaves a state at 40, past the 39 that may be reused; the second adds one at 39.
        self.assertEqual([setup.channel.cached[rid] for rid in "abc"], [0, 0, 39])

    def test_flush(self) -> None:
        setup = make()
        setup.channel.inbox.append(request("a", list(range(1, 30)), max_new=30))
        setup.turn()
        setup.channel.inbox.append(FlushCacheReqInput(seq=1))
        setup.turn()
        self.assertFalse(setup.channel.answers[0].success)
        setup.run()
        setup.channel.inbox.append(FlushCacheReqInput(seq=2))
        setup.turn()
        self.assertTrue(setup.channel.answers[1].success)
        self.assertEqual(setup.memory.allocator.available_size(), setup.memory.allocator.size)

    def test_flush_takes_in_the_step_in_flight(self) -> None:
        setup = make(overlap=True)
        setup.channel.inbox.append(request("a", [1, 2, 3], max_new=200))
        while "a" not in setup.channel.reasons:
            setup.turn()
        self.assertTrue(setup.scheduler.has_work(), "a step launched before the end was known is still in flight")
        setup.channel.inbox.append(FlushCacheReqInput(seq=1))
        setup.turn()
        self.assertTrue(setup.channel.answers[0].success, setup.channel.answers[0].message)


class TestIdle(CustomTestCase):
    def test_pools_are_recounted_only_when_nothing_has_come_for_a_while(self) -> None:
        setup = make()
        setup.scheduler.config = replace(setup.scheduler.config, deep_pool_check=False)
        depths: list[bool] = []
        setup.memory.check_idle = lambda deep: depths.append(deep)  # type: ignore[method-assign]
        seen: list[list[bool]] = []
        receive = setup.channel.receive

        def scripted(wait: bool) -> list[object]:
            if wait:  # idle: a request at once, another, a quiet second, another quiet second, the end
                seen.append(list(depths))
                step = len(seen)
                if step in (1, 2):
                    setup.channel.inbox.append(request(str(step), [1, 2, 3], max_new=2))
                elif step == 5:
                    setup.channel.inbox.append(ShutdownReq())
            return receive(wait)

        setup.channel.receive = scripted  # type: ignore[method-assign]
        setup.scheduler.event_loop()
        self.assertEqual(seen, [[], [False], [False, False], [False, False, True], [False, False, True]])

    def test_a_brief_state_is_told_without_a_look_at_the_device(self) -> None:
        setup = make()
        for brief in (True, False):
            setup.channel.inbox.append(GetInternalStateReq(seq=1, brief=brief))
            with mock.patch.object(type(setup.scheduler.config), "describe", return_value={"kernels": []}) as describe:
                setup.turn()
            self.assertEqual(describe.called, not brief)
            answer = setup.channel.answers[-1]
            assert isinstance(answer, GetInternalStateReqOutput)
            self.assertEqual(answer.internal_state["num_decode_steps"], 0)


class TestOverlap(CustomTestCase):
    def watch(self, setup: Setup) -> list[str]:
        """What happens to each step, in order: its forward, its sampling, and that its result is awaited."""
        events: list[str] = []
        forward = setup.worker.forward

        def spy(batch: ModelWorkerBatch) -> FakeForward:
            number = setup.worker.num_steps
            events.append(f"forward {number}")
            launched = forward(batch)
            sample = launched.sample

            def noted(*args: Any) -> FakeStep:
                events.append(f"sample {number}")
                step = sample(*args)
                take = step.result
                step.result = lambda: (events.append(f"result {number}"), take())[1]  # type: ignore[method-assign]
                return step

            launched.sample = noted  # type: ignore[method-assign]
            return launched

        setup.worker.forward = spy  # type: ignore[method-assign]
        return events

    def test_each_step_is_sampled_when_the_last_is_known(self) -> None:
        for overlap in (False, True):
            setup = make(overlap=overlap)
            events = self.watch(setup)
            setup.channel.inbox.append(request("a", [1, 2, 3], max_new=4))
            setup.run()
            self.assertEqual(setup.channel.outputs["a"], expected_output([1, 2, 3], 4, 256))
            prompt, turns = ["forward 0", "sample 0", "result 0"], []
            if overlap:
                turns = ["forward 1", "sample 1", "forward 2", "result 1", "sample 2", "forward 3", "result 2"]
                turns += ["sample 3", "result 3"]
            else:
                turns = [f"{what} {number}" for number in (1, 2, 3) for what in ("forward", "sample", "result")]
            self.assertEqual(events, prompt + turns)

    def submit(self, setup: Setup, prompts: list[list[int]]) -> None:
        setup.channel.inbox += [request(f"r{number}", prompt, 4) for number, prompt in enumerate(prompts)]

    def check_outputs(self, setup: Setup, prompts: list[list[int]]) -> None:
        for number, prompt in enumerate(prompts):
            self.assertEqual(setup.channel.outputs[f"r{number}"], expected_output(prompt, 4, 256))

    def test_another_prefill_step_is_launched_before_a_result_is_known(self) -> None:
        prompts = [[10 + number] * 8 for number in range(3)]
        order = ["forward 0", "sample 0", "forward 1", "result 0", "sample 1", "forward 2", "result 1", "sample 2"]
        # A decode step waits for the result of the last one.
        order += ["result 2", "forward 3"]
        for radix in (True, False):
            setup = make(overlap=True, chunk=8, radix=radix)
            events = self.watch(setup)
            self.submit(setup, prompts)
            setup.run()
            self.assertEqual(events[:10], order)
            self.check_outputs(setup, prompts)
        for options in ({"overlap": False}, {"overlap": True, "mixed": True}):
            setup = make(chunk=8, **options)
            events = self.watch(setup)
            self.submit(setup, prompts)
            setup.run()
            self.assertEqual(events[:4], ["forward 0", "sample 0", "result 0", "forward 1"], options)
            self.check_outputs(setup, prompts)

    def test_chunks_of_one_prompt_follow_each_other(self) -> None:
        """Unless a state, a window, or log-probabilities of the prompt move on with the result of each."""
        prompt = [*range(10, 36)]
        ahead = ["forward 0", "sample 0", "forward 1", "result 0", "sample 1", "forward 2", "result 1", "sample 2"]
        apart = [f"{what} {number}" for number in range(3) for what in ("forward", "sample", "result")]
        kinds: list[tuple[dict[str, Any], bool, list[str], int]] = [
            ({}, False, ahead, 26),
            ({"radix": False}, False, ahead, 0),
            ({"hybrid": True}, False, apart, 24),  # the last state that was copied
            ({"page": 8, "window": 12}, False, apart, 24),
            ({}, True, apart, 0),
        ]
        for options, scored, order, cached in kinds:
            with self.subTest(options, scored=scored):
                setup = make(overlap=True, chunk=8, **options)
                events = self.watch(setup)
                message = request("r0", prompt, 1)
                message.return_logprob = scored
                setup.channel.inbox.append(message)
                while len(events) < 8:
                    setup.turn()
                self.assertEqual(events[:8], order[:8])
                if not scored:  # the fake has no log-probabilities to give
                    setup.run()
                    self.assertEqual(setup.channel.outputs["r0"], expected_output(prompt, 1, 256))
                    self.assertEqual(setup.memory.tree.match_prefix(prompt).slot_ids.numel(), cached)

    def test_a_prompt_waits_for_a_prefix_that_is_being_computed(self) -> None:
        stem = [3 + number % 20 for number in range(40)]
        for common, cached in ((40, 40), (32, 32), (31, 0)):
            setup = make(overlap=True, chunk=48)
            events = self.watch(setup)
            prompts = [[*stem, *[30] * 8], [*stem[:common], *[31] * 10]]
            self.submit(setup, prompts)
            setup.run()
            self.check_outputs(setup, prompts)
            self.assertEqual(setup.channel.cached["r1"], cached)
            self.assertEqual(events.index("result 0") < events.index("forward 1"), cached > 0)

    def test_prompts_that_begin_alike_are_computed_once(self) -> None:
        """Four samples of one prompt, and pairs: the first of each pair fill the step in which the others wait."""
        sample = [3 + number % 20 for number in range(40)]
        pairs = [[*[first] * 35, last] for first in (30, 31, 32) for last in (40, 41)]
        # Prompt rows that are computed: with a state, the second sample finds where a third one needs a copy of it.
        kinds: list[tuple[dict[str, Any], list[list[int]], int, int]] = [
            ({}, [sample] * 4, 40 + 3, 2),
            ({"overlap": True}, [sample] * 4, 40 + 3, 2),
            ({"page": 8}, [sample] * 4, 40 + 3 * 8, 2),
            ({"hybrid": True}, [sample] * 4, 40 + 40 + 2, 3),
            ({"radix": False}, [sample] * 4, 4 * 40, 1),
            ({}, pairs, 3 * 36 + 3, 2),
            ({"overlap": True, "policy": "lpm"}, pairs, 3 * 36 + 3, 2),
            ({}, [[*[first] * 31, last] for first in (30, 31) for last in (40, 41)], 4 * 32, 1),
        ]
        for options, prompts, rows, steps in kinds:
            with self.subTest(options, prompts=len(prompts)):
                setup = make(chunk=256, **options)
                self.submit(setup, prompts)
                setup.run()
                self.check_outputs(setup, prompts)
                self.assertEqual(setup.worker.num_extend_rows, rows)
                self.assertEqual(len(setup.channel.started), steps)

    def test_a_prompt_waits_for_nothing_that_it_cannot_use(self) -> None:
        """Its log-probabilities need all of its rows."""
        setup = make(overlap=True, chunk=256)
        self.submit(setup, [[5] * 60] * 3)
        for message in setup.channel.inbox:
            message.return_logprob, message.logprob_start_len = True, 0
        setup.turn()
        self.assertEqual(setup.worker.num_extend_rows, 3 * 60)

    def test_a_faulty_chunk_ends_its_request_whose_next_chunk_is_in_flight(self) -> None:
        """With and without room for that chunk at once; the others are served and what it computed is not cached."""
        prompts = [[*range(10, 17), BAD, *range(10, 30)], [5] * 8, [6] * 20]
        for rows, pool in ((8, 400), (3, 80), (1, 400)):
            setup = make(overlap=True, chunk=8, rows=rows, pool=pool)
            events = self.watch(setup)
            self.submit(setup, prompts)
            setup.run()
            self.assertEqual(events[2:4], ["forward 1", "result 0"])
            self.assertEqual(setup.channel.reasons["r0"].status_code, 500)
            self.assertEqual(setup.channel.outputs["r0"], [])
            self.assertEqual(setup.memory.tree.match_prefix(prompts[0]).slot_ids.numel(), 0)
            for number in (1, 2):
                wanted = expected_output(prompts[number], 4, 256)
                self.assertEqual(setup.channel.outputs[f"r{number}"], wanted)

    def test_a_chunk_in_flight_is_no_prefix_for_others(self) -> None:
        """The second chunk is faulty; another prompt that begins alike is planned while it runs."""
        setup = make(overlap=True, chunk=8)
        stem = [*range(10, 25), BAD]
        self.submit(setup, [[*stem, 5, 6, 7, 8], [*stem, *[9] * 8]])
        setup.run()
        self.assertEqual(setup.channel.reasons["r0"].status_code, 500)
        self.assertEqual(setup.channel.cached["r1"], 0)
        self.assertEqual(setup.channel.outputs["r1"], expected_output([*stem, *[9] * 8], 4, 256))

    def test_penalties_keep_the_steps_in_flight(self) -> None:
        """One penalised request among others: as many steps are launched before the last is awaited as without."""
        ahead: list[int] = []
        for penalty in (1.0, 1.5):
            setup = make(overlap=True)
            events = self.watch(setup)
            for number in range(4):
                message = request(f"r{number}", [8 + number] * 5, max_new=20)
                message.sampling_params.repetition_penalty = penalty if number == 2 else 1.0
                message.sampling_params.min_new_tokens = 0 if penalty == 1.0 else 3
                setup.channel.inbox.append(message)
            setup.run()
            ahead.append(sum(a.startswith("forward") and b.startswith("result") for a, b in zip(events, events[1:])))
            self.assertEqual(setup.worker.num_penalised_steps > 0, penalty > 1.0)
        self.assertEqual(ahead[0], ahead[1])
        self.assertGreater(ahead[0], 15)

    def test_penalties_under_random_traffic(self) -> None:
        """Every sampled step knows all earlier tokens, even if requests join, end or are retracted; the fake checks."""
        for options in ({}, {"mixed": True}, {"retract_interval": 3}, {"pool": 160, "conservativeness": 0.05}):
            with self.subTest(options):
                setup = make(overlap=True, **options)
                rng = random.Random(4)
                for number in range(30):
                    message = request(
                        f"r{number}", [rng.randrange(VOCAB - 2) for _ in range(rng.choice([2, 9, 30]))], 15
                    )
                    message.sampling_params.repetition_penalty = rng.choice([1.0, 1.5])
                    setup.channel.inbox.append(message)
                    for _ in range(rng.randrange(4)):
                        setup.turn()
                    if number % 7 == 6:
                        setup.channel.inbox.append(AbortReq(rid=f"r{number - 1}"))
                setup.run()
                self.assertGreater(setup.worker.num_penalised_steps, 20)


class TestEdges(CustomTestCase):
    def test_abort_at_every_stage(self) -> None:
        for turns in range(12):
            with self.subTest(turns=turns):
                setup = make(rows=2, chunk=8, hybrid=turns % 2 == 0, overlap=turns % 3 == 0)
                for rid in "abc":
                    setup.channel.inbox.append(request(rid, list(range(1, 31)), max_new=10))
                for _ in range(turns):
                    setup.turn()
                done = set(setup.channel.reasons)
                setup.channel.inbox.append(AbortReq(abort_all=True))
                setup.turn()
                self.assertEqual(set(setup.channel.reasons), set("abc"))
                for rid in set("abc") - done:
                    self.assertEqual(setup.channel.reasons[rid].type, "abort")
                setup.memory.check_idle(deep=True)

    def test_an_abort_means_the_whole_id(self) -> None:
        setup = make()
        setup.channel.inbox += [request(rid, [1, 2, 3], max_new=6) for rid in ("job", "job_2")]
        setup.turn()
        setup.channel.inbox.append(AbortReq(rid="job"))
        setup.run()
        self.assertEqual(setup.channel.reasons["job"].type, "abort")
        self.assertEqual(setup.channel.outputs["job_2"], expected_output([1, 2, 3], 6, 256))

    def test_a_large_server_seed_gives_seeds_of_64_bits(self) -> None:
        setup = make()
        setup.scheduler.config = replace(setup.scheduler.config, random_seed=10**18)
        setup.channel.inbox.append(request("a", [1, 2, 3]))
        setup.run()
        self.assertEqual(setup.channel.outputs["a"], expected_output([1, 2, 3], 8, 256))

    def test_load_counts_each_token_once(self) -> None:
        for page in (1, 4):
            setup = make(page=page)
            setup.channel.inbox.append(request("a", list(range(8, 20)), max_new=30))
            for _ in range(3):
                setup.turn()
            held = setup.scheduler.running_reqs[0].kv_committed_len
            self.assertEqual(setup.scheduler.load()["num_used_tokens"], -(-held // page) * page)

    def test_counters_of_tokens(self) -> None:
        for options in ({}, {"mixed": True}, {"overlap": True}, {"mixed": True, "retract_interval": 3}):
            with self.subTest(options):
                setup = make(radix=False, **options)
                prompts = {rid: [ord(rid) % 7, *range(8, 8 + 5 * i)] for i, rid in enumerate("abcd", 1)}
                for rid, prompt in prompts.items():
                    setup.channel.inbox.append(request(rid, prompt, max_new=len(prompt)))
                    setup.turn()
                setup.run()
                metrics = setup.scheduler.metrics
                self.assertEqual(metrics.num_generated_tokens, sum(map(len, setup.channel.outputs.values())))
                self.assertEqual(metrics.num_prompt_tokens, sum(map(len, prompts.values())))
                if not metrics.num_retracted_reqs:
                    self.assertEqual(metrics.num_prefilled_tokens, sum(map(len, prompts.values())))

    def test_prompt_tokens_count_whole_prompts(self) -> None:
        for options in ({}, {"chunk": 8}, {"page": 4}, {"hybrid": True}, {"pool": 64, "conservativeness": 0.05}):
            with self.subTest(options):
                setup = make(**options)
                for number in range(5):
                    setup.channel.inbox.append(request(f"r{number}", list(range(8, 21)), max_new=20))
                    setup.turn()
                setup.run()
                metrics = setup.scheduler.metrics
                self.assertEqual(metrics.num_prompt_tokens, 5 * 13)
                self.assertEqual(metrics.num_cached_tokens, sum(setup.channel.cached.values()))

    def test_cached_tokens_are_those_of_the_prefix_that_is_used(self) -> None:
        """A prompt finds 64 cached tokens but no page of its own fits into the chunk; before it starts, half are
        evicted."""
        setup = make(pool=144, page=16, chunk=32)
        shared = [3, 4] * 32
        setup.channel.inbox.append(request("first", [*shared, 5], max_new=1))
        setup.run()
        long, short = request("long", [11] * 20, max_new=80), request("b", [*shared, *[6] * 17], max_new=1)
        setup.channel.inbox += [long, short]
        setup.run()
        metrics = setup.scheduler.metrics
        self.assertEqual(setup.channel.cached["b"], 32)
        self.assertEqual(metrics.num_cached_tokens, 32)
        self.assertEqual(metrics.num_prompt_tokens, 65 + 20 + 81)
        self.assertEqual(metrics.num_prefilled_tokens, metrics.num_prompt_tokens - 32)

    def test_who_leaves_the_queue_is_named_once_and_in_order(self) -> None:
        setup = make(rows=2)
        for rid in "abc":
            setup.channel.inbox.append(request(rid, [1, 2, 3]))
        setup.run()
        self.assertEqual([rid for rids in setup.channel.started for rid in rids], ["a", "b", "c"])
        self.assertGreater(len(setup.channel.started), 1)

    def test_prompt_larger_than_the_pool(self) -> None:
        setup = make(pool=64)
        setup.channel.inbox += [request("big", [1] * 64), request("fits", [1] * 63, max_new=5)]
        setup.run()
        self.assertEqual(setup.channel.reasons["big"].status_code, 400)
        self.assertEqual(len(setup.channel.outputs["fits"]), 1)

    def test_nan_logits_end_one_request_and_never_reach_the_cache(self) -> None:
        setup = make(chunk=None)
        setup.channel.inbox += [request("bad", [1, 2, 3, BAD]), request("good", [4, 5, 6])]
        setup.run()
        self.assertEqual(setup.channel.reasons["bad"].status_code, 500)
        self.assertEqual(setup.channel.outputs["bad"], [])
        self.assertEqual(setup.channel.outputs["good"], expected_output([4, 5, 6], 8, 256))
        self.assertEqual(setup.memory.tree.match_prefix([1, 2, 3, BAD]).slot_ids.numel(), 0)

    def test_zero_new_tokens(self) -> None:
        setup = make()
        setup.channel.inbox.append(request("none", [1, 2, 3], max_new=0))
        setup.run()
        self.assertEqual(setup.channel.outputs["none"], [])
        self.assertEqual(setup.channel.reasons["none"].type, "length")

    def test_a_leak_is_loud(self) -> None:
        setup = make()
        self.assertIsNotNone(setup.memory.allocator.alloc(3))
        with self.assertRaisesRegex(PoolLeakError, "3 of 400"):
            setup.memory.check_idle(deep=False)


if __name__ == "__main__":
    unittest.main()
