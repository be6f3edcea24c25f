"""A scheduler over a model whose "KV" is the token itself, which makes every wrong slot, state or order visible."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import TestCase

import torch

from sglang.srt.configs.cache_layout import WINDOW_DUMMY_PAGES
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FinishReason,
    SchedulerMessage,
    StartedReqs,
    TokenizedGenerateReqInput,
    TokenizerMessage,
)
from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_policy import PrefillLimits
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_config import SchedulerConfig
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.managers.tp_worker import Ends, StepOutput
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefix_companion import PrefixCompanion
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.state_companion import StateCompanion
from sglang.srt.mem_cache.window_companion import WindowCompanion
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.test.cache_pools import state_slots as make_state_slots

VOCAB = 50
EOS = 7
BAD = 49  # a prompt that ends in this id makes the model emit NaN


def mix(tokens: list[int], state: int = 0) -> int:
    """A rolling hash of a token sequence: what the fake model's state is."""
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


@dataclass
class FakeForward:
    """A computed step; its tokens reach the device's relay when they are sampled."""

    worker: FakeWorker
    rows: list[int]
    output: StepOutput
    sequences: list[list[int]]
    is_decode: bool
    # Tokens of each request that have KV, except as many of the last as the step gives it.
    committed: list[int]

    def drafts(self) -> list[list[int]]:
        raise AssertionError("no request of this model has a grammar")

    def sample(self, info: SamplingBatchInfo, ends: Ends | None = None) -> FakeStep:
        """Checks that penalties know all tokens so far."""
        edits = info.edits
        if edits is not None and self.is_decode:
            ones = torch.ones(len(self.sequences), info.vocab_size)
            edited, wanted = edits.apply(ones), ones
            for row, request in edits.requests.items():
                wanted[row, self.sequences[row]] /= float(request.repetition)
                if request.left > 0:
                    wanted[row, request.stops] = -math.inf
            assert torch.equal(edited, wanted), "penalties of other tokens"
            penalised = [request for request in edits.requests.values() if request.repetition != 1.0]
            self.worker.num_penalised_steps += bool(penalised)
        drawn_ids = self.output.next_token_ids
        lengths = [start + len(drawn) for start, drawn in zip(self.committed, drawn_ids, strict=True)]
        self.worker.lengths.update(zip(self.rows, lengths, strict=True))
        newest = [drawn[-1] for drawn in drawn_ids]
        info.update(torch.tensor(newest))
        self.worker.last_token.update(zip(self.rows, newest, strict=True))
        return FakeStep(self.output)


class FakeWorker:
    """Checks at each step that slots and states hold exactly what the sequence says, then emits the next token.

    With ``width`` above 1 a decode step brings drafts after each newest token, of which a share is wrong, and emits
    what follows those that are right, up to ``width`` tokens.
    """

    def __init__(self, memory: ReqMemory, states: torch.Tensor | None, width: int = 1) -> None:
        self.memory = memory
        self.states = states  # what each state slot holds, one number
        self.decode_kind = DECODE if width == 1 else StepKind("verify", width)
        self.slots: dict[int, tuple[int, int]] = {}
        # By slot of the window pools, what the tokens up to the row's own are.
        self.windows: dict[int, int] = {}
        self.last_token: dict[int, int] = {}
        self.lengths: dict[int, int] = {}  # by row, as a device knows them
        self.num_behind = 0  # rows of steps for which the host knew only a bound of the length
        self.num_steps = 0
        self.num_extend_rows = 0
        self.num_penalised_steps = 0
        self.num_of_counts: Counter[int] = Counter()  # steps of requests by the number of tokens that they gave
        self._drafts = random.Random(0)

    def forward(self, batch: ModelWorkerBatch) -> FakeForward:
        self.num_steps += 1
        width = 1 if batch.kind is None else batch.kind.rows_per_request
        lengths = batch.extend_seq_lens or [width] * batch.batch_size
        offset, ids, faults, sequences, committed = 0, [], [], [], []
        rows = batch.req_pool_indices.tolist()
        states = batch.state_slot_ids.tolist() if batch.state_slot_ids is not None else []
        assert len(set(rows)) == len(rows), "two requests share a row"
        assert len(set(batch.out_cache_loc.tolist())) == batch.out_cache_loc.numel(), "two tokens share a slot"
        for index, (row, length, end) in enumerate(zip(rows, lengths, batch.seq_lens, strict=True)):
            places = batch.out_cache_loc[offset : offset + length].tolist()
            positions = batch.positions[offset : offset + length].tolist()
            assert positions == list(range(end - length, end)), positions
            if batch.input_ids is None and width > 1:
                known = self.lengths[row]
                assert known <= end - length, "the host's length is no bound"
                self.num_behind += known < end - length
                end, positions = known + length, list(range(known, known + length))
                places = self.memory.req_pool.req_to_token[row, known:end].tolist()
            committed.append(end - length if batch.input_ids is None else end - 1)
            before = self._held(row, end - length)
            if batch.input_ids is not None:
                new = batch.input_ids[offset : offset + length].tolist()
            else:
                new = self._with_drafts(before, self.last_token.get(row, -1), length)
            offset += length
            for token, slot, position in zip(new, places, positions, strict=True):
                self.slots[slot] = (token, position)
            sequence = self._held(row, end)
            sequences.append(sequence)
            if self.memory.allocator.window is not None:
                self._run_window(row, sequence, end - length, self.memory.allocator.window)
            if states:
                assert self.states is not None
                state = self.states[states[index]]
                assert int(state.item()) == mix(before), "the state is not that of the prefix"
                state.fill_(mix(sequence))
            drawn, first = [], end - length if batch.input_ids is None else end - 1
            for stop in range(first + 1, end + 1):
                drawn.append(next_token(sequence[:stop]))
                if stop < end and drawn[-1] != sequence[stop]:
                    break
            ids.append(drawn)
            faults.append([int(sequence[first + j] == BAD) for j in range(len(drawn))])
            if batch.input_ids is None:
                self.num_of_counts[len(drawn)] += 1
        self.num_extend_rows += offset if batch.extend_seq_lens else 0
        is_decode = batch.input_ids is None and width == 1
        return FakeForward(self, rows, StepOutput(ids, faults, width), sequences, is_decode, committed)

    def _run_window(self, row: int, sequence: list[int], start: int, window: WindowPages) -> None:
        """Write the rows from ``start`` on, and read what each sees: a page of tokens, its own the last."""
        page, sums = window.page_size, [0]
        for token in sequence:
            sums.append(mix([token], sums[-1]))
        full = self.memory.req_pool.req_to_token[row, : len(sequence)].tolist()
        slots = [int(window.table[slot // page]) * page + slot % page for slot in full]
        first = max(0, start - page + 1)
        assert min(slots[first:]) >= WINDOW_DUMMY_PAGES * page, "a row of a window was given back"
        self.windows.update(zip(slots[start:], sums[start + 1 :], strict=True))
        seen = [self.windows.get(slot) for slot in slots[first:]]
        assert seen == sums[first + 1 :], "a window holds rows of other tokens"

    def _held(self, row: int, end: int) -> list[int]:
        """The tokens that the slots of a request hold."""
        held = [self.slots[slot] for slot in self.memory.req_pool.req_to_token[row, :end].tolist()]
        assert [position for _, position in held] == list(range(end)), "a slot holds another position"
        return [token for token, _ in held]

    def _with_drafts(self, before: list[int], newest: int, length: int) -> list[int]:
        tokens = [newest]
        while len(tokens) < length:
            right = next_token(before + tokens)
            tokens.append(right if self._drafts.random() < 0.7 else (right + 1) % (VOCAB - 2))
        return tokens


class FakeChannel:
    def __init__(self) -> None:
        self.inbox: list[SchedulerMessage] = []
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.started: list[list[str]] = []
        self.answers: list[TokenizerMessage] = []
        self.retractions: dict[str, int] = {}
        self.cached: dict[str, int] = {}

    def receive(self, wait: bool) -> list[SchedulerMessage]:
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

    def to_tokenizer(self, message: TokenizerMessage) -> None:
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
    width: int = 1,
    window: int = 0,
) -> Setup:
    windows = WindowPages(pool // page, window, page) if window else None
    if windows is not None:
        # As where the device has a table of its own.
        windows._is_shared, windows.table = False, windows.table.clone()
    allocator = TokenToKVPoolAllocator(pool, page, windows)
    states = None
    companions: list[PrefixCompanion[Any]] = []
    if windows is not None:
        companions.append(WindowCompanion(windows, 2 * width))
    if hybrid:
        num_slots = max(state_slots, rows)
        slots, state_memory = make_state_slots(num_slots, [0], (1, 1), (1, 1, 1), torch.int64, torch.int64)
        states = state_memory.layer(0)[1]
        companions.append(StateCompanion(slots))
    tree = RadixCache(allocator, page, disable=not radix, companions=companions)
    memory = ReqMemory(allocator, ReqToTokenPool(rows, 256 + width), tree, width)
    args = ServerArgs(
        "",
        schedule_policy=policy,
        schedule_conservativeness=conservativeness,
        enable_mixed_chunk=mixed,
        disable_overlap_schedule=not overlap,
        decode_log_interval=1000,
    )
    config = SchedulerConfig(
        args=args,
        device=torch.device("cpu"),
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        prefill=PrefillLimits(64, chunk, rows),
        max_req_len=min(256, pool - width + 1),
        random_seed=0,
        retract_interval=retract_interval,
        deep_pool_check=True,
    )
    worker, channel = FakeWorker(memory, states, width), FakeChannel()
    stands_in: Any = worker
    return Setup(Scheduler(config, stands_in, memory, channel, StopChecker(None)), worker, channel, memory)


def request(rid: str, prompt: list[int], max_new: int = 8, stream: bool = False) -> TokenizedGenerateReqInput:
    return TokenizedGenerateReqInput(
        rid=rid,
        input_ids=prompt,
        stream=stream,
        sampling_params=SamplingParams(max_new_tokens=max_new, temperature=0.0),
    )


def random_traffic(case: TestCase, seed: int, **options: Any) -> Setup:
    """Random arrivals with shared prefixes, and aborts; ``case`` asserts that each has the output of a run alone."""
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
        case.assertEqual(setup.channel.outputs[rid], tokens, f"{rid} with {options} and seed {seed}")
    return setup
