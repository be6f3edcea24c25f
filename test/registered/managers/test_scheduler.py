"""The scheduler against a model whose "KV" is the token itself, so that every wrong slot, state or order shows."""

from __future__ import annotations

import random
import unittest
from dataclasses import dataclass, replace

import torch

from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    ShutdownReq,
    StartedReqs,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.req_memory import PoolLeakError, ReqMemory
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_config import SchedulerConfig
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.managers.tp_worker import StepOutput
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.hybrid_radix_cache import HybridRadixCache
from sglang.srt.mem_cache.memory_pool import GDNStatePool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

VOCAB = 50
EOS = 7
BAD = 49  # a prompt that ends in this id makes the model emit NaN


def mix(tokens: list[int]) -> int:
    """A rolling hash of a token sequence: what the fake model's state is."""
    state = 0
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state


def next_token(tokens: list[int]) -> int:
    return mix(tokens) % (VOCAB - 2)


def expected_output(prompt: list[int], max_new: int, max_req_len: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(min(max_new, max_req_len - len(prompt))):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeStep:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class FakeWorker:
    """Checks at each step that slots and states hold exactly what the sequence says, then emits the next token."""

    def __init__(self, memory: ReqMemory) -> None:
        self.memory = memory
        self.slots: dict[int, tuple[int, int]] = {}
        self.last_token: dict[int, int] = {}
        self.num_steps = 0
        self.num_extend_rows = 0

    def launch(self, batch: ModelWorkerBatch, info: object) -> FakeStep:
        self.num_steps += 1
        drawn_last = [self.last_token.get(row, -1) for row in batch.req_pool_indices.tolist()]
        input_ids = torch.tensor(drawn_last) if batch.input_ids is None else batch.input_ids
        lengths = batch.extend_seq_lens or [1] * batch.batch_size
        offset, ids, invalid = 0, [], []
        rows = batch.req_pool_indices.tolist()
        states = batch.state_slot_ids.tolist() if batch.state_slot_ids is not None else []
        assert len(set(rows)) == len(rows), "two requests share a row"
        assert len(set(batch.out_cache_loc.tolist())) == batch.out_cache_loc.numel(), "two tokens share a slot"
        for index, (row, length, end) in enumerate(zip(rows, lengths, batch.seq_lens, strict=True)):
            new = input_ids[offset : offset + length].tolist()
            places = batch.out_cache_loc[offset : offset + length].tolist()
            positions = batch.positions[offset : offset + length].tolist()
            assert positions == list(range(end - length, end)), positions
            offset += length
            for token, slot, position in zip(new, places, positions, strict=True):
                self.slots[slot] = (token, position)
            table = self.memory.req_pool.req_to_token[row, :end].tolist()
            held = [self.slots[slot] for slot in table]
            assert [position for _, position in held] == list(range(end)), "a slot holds another position"
            sequence = [token for token, _ in held]
            if states:
                state = self.memory.state_pool.ssm(0)[states[index]]
                assert int(state.item()) == mix(sequence[: end - length]), "the state is not that of the prefix"
                state.fill_(mix(sequence))
            ids.append(next_token(sequence))
            invalid.append(sequence[-1] == BAD)
        self.num_extend_rows += offset if batch.extend_seq_lens else 0
        self.last_token.update(zip(rows, ids, strict=True))
        return FakeStep(StepOutput(ids, invalid))


class FakeChannel:
    def __init__(self) -> None:
        self.inbox: list[object] = []
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, object] = {}
        self.started: list[list[str]] = []
        self.answers: list[object] = []
        self.retractions: dict[str, int] = {}
        self.cached: dict[str, int] = {}

    def receive(self, wait: bool) -> list[object]:
        messages, self.inbox = self.inbox, []
        return messages

    def to_detokenizer(self, message: BatchTokenIDOutput) -> None:
        for output in message.outputs:
            assert output.rid not in self.reasons, "a finished request spoke again"
            self.outputs.setdefault(output.rid, []).extend(output.output_ids)
            self.retractions[output.rid] = output.num_retractions
            self.cached[output.rid] = output.cached_tokens
            if output.finish_reason is not None:
                self.reasons[output.rid] = output.finish_reason

    def to_tokenizer(self, message: object) -> None:
        if isinstance(message, StartedReqs):
            self.started.append(message.rids)
        else:
            self.answers.append(message)


@dataclass
class Setup:
    scheduler: Scheduler
    worker: FakeWorker
    channel: FakeChannel
    memory: ReqMemory

    def run(self, limit: int = 20_000) -> None:
        """Step until nothing is left, then check that nothing is held."""
        for _ in range(limit):
            self.turn()
            if not self.scheduler.has_work() and not self.channel.inbox:
                self.memory.check_idle(deep=True)
                return
        raise AssertionError(f"still busy after {limit} turns: {self.scheduler.load()}")

    def turn(self) -> None:
        for message in self.channel.receive(wait=False):
            self.scheduler._handle(message)
        if not self.scheduler.step():
            assert not self.scheduler.has_work(), "work, but no step"


def make(
    pool: int = 400,
    page: int = 1,
    rows: int = 8,
    chunk: int | None = 16,
    hybrid: bool = False,
    radix: bool = True,
    policy: str = "fcfs",
    mixed: bool = False,
    retract_interval: int = 0,
    state_slots: int = 12,
    conservativeness: float = 1.0,
    overlap: bool = False,
) -> Setup:
    allocator = TokenToKVPoolAllocator(pool, page)
    state_pool = None
    tree: RadixCache
    if hybrid:
        state_pool = GDNStatePool(max(state_slots, rows), [0], 1, 2, 1, 1, 1, torch.int64, torch.int64, "cpu")
        tree = HybridRadixCache(allocator, page, state_pool, disable=not radix)
    else:
        tree = RadixCache(allocator, page, disable=not radix)
    memory = ReqMemory(allocator, ReqToTokenPool(rows, 257), tree, state_pool)
    config = SchedulerConfig(
        device=torch.device("cpu"),
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        max_running_requests=rows,
        max_prefill_tokens=64,
        chunked_prefill_size=chunk,
        max_req_len=min(256, pool),
        schedule_policy=policy,
        schedule_conservativeness=conservativeness,
        enable_mixed_chunk=mixed,
        enable_overlap=overlap,
        stream_interval=1,
        decode_log_interval=1000,
        random_seed=0,
        retract_interval=retract_interval,
        deep_pool_check=True,
    )
    worker, channel = FakeWorker(memory), FakeChannel()
    return Setup(Scheduler(config, worker, memory, channel, StopChecker(None)), worker, channel, memory)


def request(rid: str, prompt: list[int], max_new: int = 8, stream: bool = False) -> TokenizedGenerateReqInput:
    return TokenizedGenerateReqInput(
        rid=rid,
        input_ids=prompt,
        stream=stream,
        sampling_params=SamplingParams(max_new_tokens=max_new, temperature=0.0),
    )


class TestRandomTraffic(CustomTestCase):
    """Random arrivals with shared prefixes, on pools that overflow; outputs must be those of each request alone."""

    def traffic(self, seed: int, **options: object) -> Setup:
        rng = random.Random(seed)
        setup = make(**options)
        limit = setup.scheduler.config.max_req_len
        stems = [[rng.randrange(VOCAB - 2) for _ in range(rng.randrange(1, 60))] for _ in range(4)]
        wanted: dict[str, list[int]] = {}
        for number in range(40):
            stem = rng.choice(stems)
            prompt = stem[: rng.randrange(1, len(stem) + 1)] + [
                rng.randrange(VOCAB - 2) for _ in range(rng.choice([0, 1, 30]))
            ]
            prompt = prompt[: limit - 1]
            max_new = rng.choice([1, 2, 20, 60])
            rid = f"r{number}"
            wanted[rid] = expected_output(prompt, max_new, limit)
            setup.channel.inbox.append(request(rid, prompt, max_new, stream=rng.random() < 0.5))
            for _ in range(rng.randrange(0, 6)):
                setup.turn()
            if rng.random() < 0.15:
                victim = f"r{rng.randrange(number + 1)}"
                if victim not in setup.channel.reasons:
                    setup.channel.inbox.append(AbortReq(rid=victim))
                    setup.turn()
                    if setup.channel.reasons[victim].type == "abort":
                        wanted.pop(victim, None)
        setup.run()
        for rid, tokens in wanted.items():
            self.assertEqual(setup.channel.outputs[rid], tokens, f"{rid} with {options} and seed {seed}")
        return setup

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
        ]
        for mode in modes:
            for seed in range(6):
                with self.subTest(mode=mode, seed=seed):
                    self.traffic(seed, **mode)

    def test_tight_pool_retracts_and_stays_right(self) -> None:
        retracted = 0
        for hybrid in (False, True):
            for page in (1, 4):
                for seed in range(6):
                    with self.subTest(hybrid=hybrid, page=page, seed=seed):
                        options = {"hybrid": hybrid, "page": page, "mixed": seed % 2 == 1, "overlap": seed % 3 > 0}
                        setup = self.traffic(seed, pool=160, conservativeness=0.05, **options)
                        retracted += setup.scheduler.metrics.num_retracted_reqs
        self.assertGreater(retracted, 20)

    def test_forced_retraction(self) -> None:
        for overlap in (False, True):
            setup = self.traffic(3, retract_interval=3, overlap=overlap)
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


class TestOverlap(CustomTestCase):
    def test_the_next_step_is_launched_before_the_last_is_awaited(self) -> None:
        for overlap in (False, True):
            setup = make(overlap=overlap)
            events: list[str] = []
            launch = setup.worker.launch

            def spy(batch: ModelWorkerBatch, info: object, launch=launch, events=events, setup=setup) -> FakeStep:
                number = setup.worker.num_steps
                events.append(f"launch {number}")
                step = launch(batch, info)
                take = step.result

                def result() -> StepOutput:
                    events.append(f"result {number}")
                    return take()

                step.result = result  # type: ignore[method-assign]
                return step

            setup.worker.launch = spy  # type: ignore[method-assign]
            setup.channel.inbox.append(request("a", [1, 2, 3], max_new=4))
            setup.run()
            self.assertEqual(setup.channel.outputs["a"], expected_output([1, 2, 3], 4, 256))
            late = events.index("result 1") > events.index("launch 2")
            self.assertEqual(late, overlap, events)


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
            held = setup.scheduler.running[0].kv_committed_len
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
