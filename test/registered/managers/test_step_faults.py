"""Steps with faults on the device: which request ends, what never enters the prefix cache, what is withdrawn."""

from __future__ import annotations

import math
import random
import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sglang.srt.layers.logits_processor import RowFault
from sglang.srt.layers.logprobs import HostLogprobs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.radix_integrity import check_integrity
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.test import scheduler_fakes as fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")


LIMIT = 256


class NanWorker:
    """Makes a fake worker produce NaN: a faulty step writes poison, and all that is computed from poison is poison.

    ``strike`` says of each request of a step, by request and first and last token, whether the device goes wrong.
    """

    def __init__(self, setup: Any) -> None:
        self.strike: Callable[[Req, int, int], bool] = lambda req, start, end: False
        self.struck: set[str] = set()
        self.bad_slots: set[int] = set()
        self.bad_states: set[int] = set()
        self._memory = setup.memory
        self._forward = setup.worker.forward
        self._batch: Any = None
        setup.worker.forward = self.forward
        launch = setup.scheduler._launch
        setup.scheduler._launch = lambda batch, agreed: (setattr(self, "_batch", batch), launch(batch, agreed))[1]
        for companion in self._memory.tree.companions:
            self._follow_states(companion.slots)

    def _follow_states(self, pool: Any) -> None:
        alloc, copy = pool.alloc, pool.copy

        def alloc_clean(zero: bool = True) -> int | None:
            slot = alloc(zero=zero)
            self.bad_states.discard(slot)
            return slot

        def copy_along(src: int, dst: int) -> None:
            copy(src, dst)
            (self.bad_states.add if src in self.bad_states else self.bad_states.discard)(dst)

        pool.alloc, pool.copy = alloc_clean, copy_along

    def forward(self, batch: ModelWorkerBatch) -> Any:
        step = self._forward(batch)
        lengths = batch.extend_seq_lens or [1] * batch.batch_size
        states = (
            [-1 - i for i in range(batch.batch_size)] if batch.state_slot_ids is None else batch.state_slot_ids.tolist()
        )
        offset = 0
        for index, req in enumerate(self._batch.reqs):
            places = set(batch.out_cache_loc[offset : offset + lengths[index]].tolist())
            offset += lengths[index]
            self.bad_slots -= places
            row, end = int(batch.req_pool_indices[index]), batch.seq_lens[index]
            bad = self.strike(req, end - lengths[index], end)
            if bad:
                self.struck.add(req.rid)
            held = set(self._memory.req_pool.req_to_token[row, :end].tolist())
            if bad or held & self.bad_slots or states[index] in self.bad_states:
                self.bad_slots |= places
                self.bad_states |= {state for state in states[index : index + 1] if state > 0}
                step.output.row_faults[index][0] = RowFault.LOGITS
        return step


def make(**options: Any) -> tuple[Any, NanWorker]:
    setup = fakes.make(**options)
    return setup, NanWorker(setup)


def strike_at(rid: str, position: int) -> Callable[[Req, int, int], bool]:
    """The step in which ``rid`` computes the token at ``position``, once."""
    left = [1]

    def strike(req: Req, start: int, end: int) -> bool:
        hit = req.rid == rid and start <= position < end and left[0] > 0
        left[0] -= hit
        return hit

    return strike


MODES: list[dict[str, Any]] = [
    {"chunk": None}, {"chunk": 8}, {"chunk": 8, "page": 4}, {"chunk": 8, "mixed": True}, {"chunk": 8, "overlap": True},
    {"chunk": 16, "page": 4, "mixed": True, "overlap": True}, {"chunk": 8, "policy": "lpm", "overlap": True},
]  # fmt: skip


def modes() -> list[dict[str, Any]]:
    return [{**mode, "hybrid": hybrid} for hybrid in (False, True) for mode in MODES]


class TestOneFault(CustomTestCase):
    def ask(self, setup: Any, rid: str, prompt: list[int], max_new: int = 12) -> None:
        setup.channel.inbox.append(fakes.request(rid, prompt, max_new))

    def check(self, setup: Any, rid: str, prompt: list[int], max_new: int = 12) -> None:
        self.assertNotEqual(setup.channel.reasons[rid].type, "abort", rid)
        self.assertEqual(setup.channel.outputs[rid], fakes.expected_output(prompt, max_new, LIMIT), rid)

    def test_every_position(self) -> None:
        """One NaN anywhere in prompt or output ends its request; nothing stays, retry and neighbours are right."""
        prompt = [8 + i % 30 for i in range(37)]
        while len(fakes.expected_output(prompt, 12, LIMIT)) < 12:
            prompt.append(9)
        fork = prompt[:20] + [1, 2, 3]
        for mode in modes():
            for position in (0, 7, 8, 20, len(prompt) - 1, len(prompt), len(prompt) + 5):
                with self.subTest(mode=mode, position=position):
                    setup, worker = make(**mode)
                    worker.strike = strike_at("hit", position)
                    self.ask(setup, "hit", prompt)
                    self.ask(setup, "beside", [3, *fork])
                    setup.run()
                    reason = setup.channel.reasons["hit"]
                    self.assertEqual((reason.type, reason.status_code), ("abort", 500))
                    self.assertIn("not numbers", reason.message)
                    self.assertEqual(setup.memory.tree.match_prefix(prompt).kv_len, 0, "something of it stayed")
                    for rid, again in (("retry", prompt), ("fork", fork), ("twice", prompt)):
                        self.ask(setup, rid, again)
                        setup.run()
                        self.check(setup, rid, again)
                    self.check(setup, "beside", [3, *fork])
                    self.assertEqual(worker.struck, {"hit"})

    def test_what_others_had_cached_stays(self) -> None:
        stem = list(range(8, 24))
        for mode in modes():
            with self.subTest(mode=mode):
                setup, worker = make(**mode)
                self.ask(setup, "first", stem, 1)
                setup.run()
                before = setup.memory.tree.match_prefix(stem).slot_ids.numel()
                worker.strike = strike_at("hit", 40)
                self.ask(setup, "hit", stem + [5] * 30)
                setup.run()
                self.assertEqual(setup.channel.reasons["hit"].status_code, 500)
                self.assertEqual(setup.memory.tree.match_prefix(stem + [5] * 30).slot_ids.numel(), before)

    def test_requests_on_withdrawn_nodes_go_on_and_cache_nothing_on_them(self) -> None:
        """While a long prompt is computed chunk by chunk, another one takes its first chunks from the cache."""
        prompt = [8 + i % 30 for i in range(60)]
        for page in (1, 4):
            for hybrid in (False, True):
                for last in (30, 50):
                    with self.subTest(page=page, hybrid=hybrid, last=last):
                        setup, worker = make(chunk=8, page=page, hybrid=hybrid, rows=4)
                        worker.strike = strike_at("hit", last)
                        self.ask(setup, "hit", prompt)
                        for _ in range(3):
                            setup.turn()
                        guest = prompt[:18] + [1, 2, 3, 4]
                        self.ask(setup, "guest", guest, 40)
                        while "hit" not in setup.channel.reasons:
                            setup.turn()
                        check_integrity(setup.memory.tree)
                        if setup.channel.reasons.get("guest") is None:
                            setup.turn()
                            check_integrity(setup.memory.tree)
                        self.ask(setup, "retry", prompt)
                        setup.run()
                        self.check(setup, "guest", guest, 40)
                        self.check(setup, "retry", prompt)
                        self.ask(setup, "again", guest)
                        setup.run()
                        self.check(setup, "again", guest)

    def test_retracted_requests_remember_what_was_theirs(self) -> None:
        prompt = [8 + i % 30 for i in range(37)]
        setup, worker = make(chunk=8)
        self.ask(setup, "hit", prompt, 30)
        while not setup.scheduler.running_reqs:
            setup.turn()
        setup.scheduler._retract(setup.scheduler.running_reqs[0], setup.scheduler.running_reqs)
        self.assertGreater(setup.memory.tree.match_prefix(prompt).kv_len, 30)
        worker.strike = lambda req, start, end: True
        setup.run()
        self.assertEqual(setup.channel.reasons["hit"].status_code, 500)
        self.assertEqual(setup.memory.tree.match_prefix(prompt).kv_len, 0)

    def test_the_step_in_flight_at_the_end_is_not_cached(self) -> None:
        """With overlap one more step is launched before the last token is known; its result is never read."""
        prompt = [8 + i % 30 for i in range(9)]
        for page in (1, 4):
            output = fakes.expected_output(prompt, 40, LIMIT)
            for max_new in [i for i in range(2, 12) if output[i - 1] not in output[: i - 1]]:
                with self.subTest(page=page, max_new=max_new):
                    setup, worker = make(overlap=True, chunk=None, page=page)
                    # An end token that nobody can foresee: the request's own.
                    message = fakes.request("a", prompt, 40)
                    message.sampling_params.stop_token_ids = [output[max_new - 1]]
                    ended = output[: output.index(output[max_new - 1]) + 1]
                    end = len(prompt) + len(ended)
                    worker.strike = strike_at("a", end - 1)
                    setup.channel.inbox.append(message)
                    setup.run()
                    self.assertEqual(setup.channel.outputs["a"], ended)
                    self.assertEqual(worker.struck, {"a"}, "the step in flight was not struck")
                    longer = prompt + ended + [1, 2]
                    cached = setup.memory.tree.match_prefix(longer).slot_ids.numel()
                    self.assertEqual(cached, (end - 1) // page * page)
                    self.ask(setup, "b", longer)
                    setup.run()
                    self.check(setup, "b", longer)


class TestKindsOfFault(CustomTestCase):
    def run_with(self, fault: RowFault, chunk: int | None, step_of_fault: int) -> Any:
        setup = fakes.make(chunk=chunk)
        forward = setup.worker.forward

        def faulty(batch: ModelWorkerBatch) -> Any:
            step = forward(batch)
            if setup.worker.num_steps == step_of_fault:
                step.output.row_faults[0][0] = fault
            return step

        setup.worker.forward = faulty
        setup.channel.inbox.append(fakes.request("a", list(range(8, 28)), 6))
        setup.run()
        return setup

    def test_reasons(self) -> None:
        for fault, status, words in (
            (RowFault.LOGITS, 500, "not numbers"),
            (RowFault.EDITED, 400, "min_new_tokens"),
            (RowFault.TOKEN_ID, 500, "outside the vocabulary"),
        ):
            with self.subTest(fault):
                told = self.assertNoLogs if status == 400 else self.assertLogs
                with told("sglang", "ERROR"):  # the main process says what a client did
                    setup = self.run_with(fault, None, 3)
                reason = setup.channel.reasons["a"]
                self.assertEqual((reason.type, reason.status_code), ("abort", status))
                self.assertRegex(reason.message, words)
                self.assertEqual(setup.scheduler.metrics.num_aborted_reqs, 1)
                # The model's own rows were sound where the request's edits alone were not.
                cached = setup.memory.tree.match_prefix(list(range(8, 28))).slot_ids.numel()
                self.assertEqual(cached, 20 if fault == RowFault.EDITED else 0)

    def run_scored(self, value: float, chunk: int | None) -> Any:
        """A request for log-probabilities of its prompt, of which the first step gives -1 and ``value``."""
        setup = fakes.make(chunk=chunk)
        forward = setup.worker.forward

        def scored(batch: ModelWorkerBatch) -> Any:
            step = forward(batch)
            prompts = {0: [HostLogprobs([-1.0, value], [], [])]} if setup.worker.num_steps == 1 else {}
            found = HostLogprobs([-1.0] * batch.batch_size, [], [])
            step.output = replace(step.output, logprobs=found, prompt_logprobs=prompts)
            return step

        setup.worker.forward = scored
        message = fakes.request("a", list(range(8, 28)), 6)
        message.return_logprob, message.logprob_start_len = True, 0
        setup.channel.inbox.append(message)
        setup.run()
        return setup

    def test_a_prompt_row_that_is_not_a_number(self) -> None:
        """The last row of a prompt may be sound where another one, whose log-probability was asked for, is not."""
        for value, ends in ((-2.0, False), (-math.inf, False), (math.nan, True)):
            for chunk in (None, 8):
                with self.subTest(value=value, chunk=chunk):
                    setup = self.run_scored(value, chunk)
                    reason = setup.channel.reasons["a"]
                    self.assertEqual(reason.type == "abort", ends)
                    if ends:
                        self.assertIn("not numbers", reason.message)
                        self.assertEqual(setup.memory.tree.match_prefix(list(range(8, 28))).kv_len, 0)

    def test_rows_that_draw_nothing_are_judged_by_the_models_logits_alone(self) -> None:
        for fault, ends in ((RowFault.LOGITS, True), (RowFault.EDITED, False), (RowFault.TOKEN_ID, False)):
            with self.subTest(fault):
                setup = self.run_with(fault, 8, 2)
                self.assertEqual(setup.channel.reasons["a"].type == "abort", ends)


class TestFences(CustomTestCase):
    """A request that no step can serve, and one that fails while its token is processed, end without others."""

    PROMPT = [8, 9, 10]

    def ask(self, setup: Any, rid: str, params: dict[str, Any] | None = None, **fields: Any) -> None:
        message = fakes.request(rid, fields.pop("prompt", self.PROMPT), 8)
        for name, value in (params or {}).items():
            setattr(message.sampling_params, name, value)
        for name, value in fields.items():
            setattr(message, name, value)
        setup.channel.inbox.append(message)

    def check_neighbours(self, setup: Any, *rids: str) -> None:
        for rid in rids:
            self.assertEqual(setup.channel.outputs[rid], fakes.expected_output(self.PROMPT, 8, LIMIT))

    def test_values_outside_the_vocabulary(self) -> None:
        cases: list[dict[str, Any]] = [
            {"params": {"stop_token_ids": [fakes.VOCAB], "min_new_tokens": 2}},
            {"params": {"stop_token_ids": [-5], "min_new_tokens": 2}},
            {"params": {"logit_bias": {str(fakes.VOCAB): 1.0}}},
            {"params": {"logit_bias": {"-1": 1.0}}},
            {"params": {"logit_bias": {"x": 1.0}}},
            {"params": {"sampling_seed": 2**63, "temperature": 1.0}},
            {"prompt": [8, fakes.VOCAB]},
            {"prompt": [8, fakes.VOCAB], "params": {"repetition_penalty": 1.5}},
            {"prompt": [-1, 8]},
            {"prompt": [2**63]},
            {"return_logprob": True, "token_ids_logprob": [fakes.VOCAB]},
            {"return_logprob": True, "top_logprobs_num": -1},
        ]
        for case in cases:
            with self.subTest(case):
                setup = fakes.make()
                self.ask(setup, "first")
                self.ask(setup, "bad", **case)
                self.ask(setup, "last")
                setup.run()
                self.check_neighbours(setup, "first", "last")
                reason = setup.channel.reasons["bad"]
                self.assertEqual((reason.type, reason.status_code, setup.channel.outputs["bad"]), ("abort", 500, []))
                self.assertIn("cannot be served", reason.message)

    def test_an_end_token_outside_the_vocabulary(self) -> None:
        """It ends nothing; if min_new_tokens would forbid it, only that request is refused."""
        for end in (fakes.VOCAB, -5, 10**12):
            with self.subTest(end):
                setup = fakes.make()
                setup.scheduler.config = replace(setup.scheduler.config, eos_token_ids=(fakes.EOS, end))
                self.ask(setup, "first")
                self.ask(setup, "bad", {"min_new_tokens": 2})
                self.ask(setup, "deaf", {"min_new_tokens": 2, "ignore_eos": True})
                setup.run()
                self.check_neighbours(setup, "first", "deaf")
                self.assertIn(str(end), setup.channel.reasons["bad"].message)

    def test_a_stop_check_that_fails(self) -> None:
        for overlap in (False, True):
            setup = fakes.make(overlap=overlap)
            check = setup.scheduler.stop_checker.check

            def broken(req: Req, check: Any = check) -> Any:
                if req.rid == "bad" and len(req.output_ids) == 3:
                    raise IndexError("a tokenizer that does not know the id")
                return check(req)

            setup.scheduler.stop_checker.check = broken
            for rid in ("first", "bad", "last"):
                self.ask(setup, rid)
            setup.run()
            self.check_neighbours(setup, "first", "last")
            reason = setup.channel.reasons["bad"]
            self.assertEqual((reason.type, reason.status_code), ("abort", 500))
            self.assertIn("does not know the id", reason.message)

    def test_min_new_tokens_forbids_every_end_id_that_ends(self) -> None:
        setup = fakes.make()
        setup.scheduler.config = replace(setup.scheduler.config, eos_token_ids=(3, 7, 11))
        rows = []
        for params in ({}, {"ignore_eos": True}, {"stop_token_ids": [5]}, {"ignore_eos": True, "stop_token_ids": [5]}):
            self.ask(setup, f"r{len(rows)}", params)
            rows.append(params)
        for message in setup.channel.receive(wait=False):
            setup.scheduler._handle(message)
        forbidden = [req.sampling_row().stop_ids for req in setup.scheduler.waiting_queue]
        self.assertEqual(forbidden, [[3, 7, 11], [], [3, 5, 7, 11], [5]])


class TestWire(CustomTestCase):
    def test_stop_strings_and_prompt_logprobs_travel_once(self) -> None:
        setup = fakes.make()
        seen: list[Any] = []
        send = setup.channel.to_detokenizer
        setup.channel.to_detokenizer = lambda message: (seen.extend(message.outputs), send(message))
        message = fakes.request("a", [1, 2, 3], 8, stream=True)
        message.sampling_params.stop = ["x" * 100, "y"]
        message.return_logprob, message.logprob_start_len = True, 2
        forward = setup.worker.forward

        def scored(batch: ModelWorkerBatch) -> Any:
            step = forward(batch)
            step.output = replace(step.output, logprobs=HostLogprobs([-1.0] * batch.batch_size, [], []))
            return step

        setup.worker.forward = scored
        setup.channel.inbox.append(message)
        setup.run()
        self.assertEqual(len(seen), 8)
        self.assertEqual([output.stop for output in seen], [["x" * 100, "y"]] + [[]] * 7)
        self.assertEqual([output.input_logprobs is not None for output in seen], [True] + [False] * 7)


class TestRandomFaults(CustomTestCase):
    def test_only_struck_requests_end_and_all_is_right_afterwards(self) -> None:
        num_ended = 0
        for mode in [*modes(), {"pool": 160, "conservativeness": 0.05, "overlap": True}, {"retract_interval": 3}]:
            for seed in range(2):
                with self.subTest(mode=mode, seed=seed):
                    rng = random.Random(seed)
                    setup, worker = make(**mode)
                    limit = setup.scheduler.config.max_req_len
                    worker.strike = lambda req, start, end, rng=rng: rng.random() < 0.02
                    stems = [[rng.randrange(fakes.VOCAB - 2) for _ in range(40)] for _ in range(3)]
                    prompts = {}
                    for number in range(20):
                        tail = [rng.randrange(fakes.VOCAB - 2) for _ in range(rng.choice([1, 20]))]
                        prompts[f"r{number}"] = rng.choice(stems)[: rng.randrange(1, 41)] + tail
                        setup.channel.inbox.append(fakes.request(f"r{number}", prompts[f"r{number}"], 15))
                        for _ in range(rng.randrange(0, 5)):
                            setup.turn()
                        check_integrity(setup.memory.tree)
                    setup.run()
                    ended = {rid for rid, reason in setup.channel.reasons.items() if reason.type == "abort"}
                    self.assertLessEqual(ended, worker.struck, "a neighbour was ended")
                    num_ended += len(ended)
                    worker.strike = lambda req, start, end: False
                    for rid, prompt in prompts.items():
                        if rid not in ended:
                            self.assertEqual(setup.channel.outputs[rid], fakes.expected_output(prompt, 15, limit))
                        setup.channel.inbox.append(fakes.request(f"again {rid}", prompt, 15))
                    setup.run()
                    for rid, prompt in prompts.items():
                        wanted = fakes.expected_output(prompt, 15, limit)
                        self.assertEqual(setup.channel.outputs[f"again {rid}"], wanted, rid)
        self.assertGreater(num_ended, 100)


class TestTree(CustomTestCase):
    def test_withdrawing_nothing(self) -> None:
        setup = fakes.make()
        tree, allocator = setup.memory.tree, setup.memory.allocator
        tree.withdraw(tree.root, 0)
        slots = allocator.alloc(4)
        node = tree.insert([1, 2, 3, 4], slots).node
        tree.withdraw(node, 4)
        self.assertEqual(tree.match_prefix([1, 2, 3, 4]).slot_ids.numel(), 4)
        tree.withdraw(node, 3)  # no node begins there: the one that holds the token goes
        self.assertEqual((tree.match_prefix([1, 2, 3, 4]).kv_len, tree.total_size()), (0, 0))
        self.assertEqual(allocator.available_size(), allocator.size)
        check_integrity(tree, held=0)

    def test_locked_parts_go_with_their_last_lock(self) -> None:
        setup = fakes.make()
        tree, allocator = setup.memory.tree, setup.memory.allocator
        upper = tree.insert([1, 2], allocator.alloc(2)).node
        slots = torch.cat([tree.path_slots(upper), allocator.alloc(2)])
        lower = tree.insert([1, 2, 3, 4], slots).node
        tree.inc_lock_ref(lower)
        tree.inc_lock_ref(upper)
        tree.withdraw(upper, 0)
        self.assertEqual((tree.total_size(), tree.evictable_size(), tree.match_prefix([1, 2]).kv_len), (0, 0, 0))
        check_integrity(tree, held=0)
        with self.assertRaisesRegex(RuntimeError, "4 locked tokens"):
            tree.reset()
        again = tree.insert([1, 2], allocator.alloc(2)).node
        tree.dec_lock_ref(lower)
        self.assertEqual(allocator.available_size(), allocator.size - 4, "the lower part is free, the upper is not")
        tree.dec_lock_ref(upper)
        self.assertEqual(allocator.available_size(), allocator.size - 2)
        self.assertIs(tree.match_prefix([1, 2]).node, again)
        check_integrity(tree, held=0)
        self.assertEqual(tree.evict(100), 2)
        check_integrity(tree, held=0)


if __name__ == "__main__":
    unittest.main()
