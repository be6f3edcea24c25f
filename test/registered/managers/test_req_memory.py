"""Slots of requests whose steps compute several tokens and keep some of them."""

import random
import unittest

import torch

from sglang.srt.configs.cache_layout import FULL
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.req_memory import PoolLeakError, ReqMemory
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_integrity import check_integrity
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

NUM_ROWS, CONTEXT = 6, 96


def make_memory(size: int, page_size: int, step_width: int, step_ahead: int = 0) -> ReqMemory:
    allocator = TokenToKVPoolAllocator(size, page_size)
    tree = RadixCache(allocator, page_size)
    return ReqMemory(allocator, ReqToTokenPool(NUM_ROWS, CONTEXT), tree, step_width, step_ahead)


def compute(req: Req, slots: torch.Tensor, text: dict[int, list[int]]) -> None:
    """Write down, for the ``slots`` of the last committed tokens, the text up to each and the token after it."""
    end = req.kv_committed_len
    for at, slot in zip(range(end - len(slots), end), slots.tolist(), strict=True):
        text[slot] = req.token_ids[: at + 2].tolist()


def admitted(memory: ReqMemory, rid: str, prompt: list[int], text: dict[int, list[int]] | None = None) -> Req:
    """A request that decodes: its prompt is computed and shared, and one token is sampled."""
    params = SamplingParams(max_new_tokens=CONTEXT)
    req = Req(TokenizedGenerateReqInput(rid=rid, input_ids=prompt, sampling_params=params), 0, frozenset())
    match = memory.match(req)
    memory.tree.inc_lock_ref(match.node)
    memory.admit(req, match)
    slots = memory.extend([req], [req.seq_len])
    assert slots is not None
    req.kv_committed_len = req.seq_len
    req.output_ids.append(0)
    compute(req, slots, {} if text is None else text)
    memory.share_prefix(req)
    return req


class TestStepsOfManyTokens(CustomTestCase):
    def test_the_slots_of_a_step_are_those_behind_the_committed_tokens(self) -> None:
        for page_size in (1, 4, 16):
            for width, ahead in ((1, 0), (2, 0), (4, 0), (3, 1), (4, 2)):
                with self.subTest(page_size=page_size, width=width, ahead=ahead):
                    self.simulate(page_size, width, ahead, random.Random(page_size * 10 + width))

    def simulate(self, page_size: int, width: int, ahead: int, rng: random.Random) -> None:
        """Random requests, steps, acceptances and releases, next to a table of who owns which slot."""
        memory = make_memory(320, page_size, width, ahead)
        reach = width + ahead
        running: list[Req] = []
        text: dict[int, list[int]] = {}
        refused = kept = 0
        for number in range(300):
            if len(running) < NUM_ROWS and rng.random() < 0.3:
                prompt = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
                if memory.room()[FULL] >= 20 + ahead + page_size:
                    running.append(admitted(memory, str(number), prompt, text))
            ready = [req for req in running if req.kv_committed_len + reach <= CONTEXT and rng.random() < 0.8]
            if ready:
                needed, before = memory.missing_for_step(ready), memory.room()[FULL]
                slots = memory.extend_step(ready)
                self.assertEqual(slots is None, needed > before)
                refused += slots is None
                if slots is not None:
                    self.check_step(memory, ready, slots, reach)
                    self.assertEqual(before - memory.room()[FULL], needed)
                    for req, row in zip(ready, slots.view(len(ready), reach), strict=True):
                        accepted = rng.randint(1, width)
                        kept += width - accepted
                        req.kv_committed_len += accepted
                        req.output_ids += [rng.randrange(3) for _ in range(accepted)]
                        compute(req, row[:accepted], text)
            self.check_owners(memory, running)
            self.check_rows(memory, running, text, drafts=width > 1)
            for req in [req for req in running if req.kv_committed_len + reach > CONTEXT or rng.random() < 0.1]:
                running.remove(req)
                memory.release(req, cache=rng.random() < 0.7)
        for req in running:
            memory.release(req, cache=True)
        memory.check_idle(deep=True)
        self.assertGreater(memory.tree.total_size(), 0)
        self.assertEqual(kept > 0, width > 1, "steps whose tokens were not all accepted")

    def check_rows(self, memory: ReqMemory, running: list[Req], text: dict[int, list[int]], drafts: bool) -> None:
        """Each row is of its request's own text, the draft layer's with the token after it too."""
        for req in running:
            known, end = req.token_ids.tolist(), req.kv_committed_len
            for at, slot in enumerate(memory.req_pool.read(req.req_pool_idx, 0, end).tolist()):
                seen = at + 1 + drafts
                self.assertEqual(text[slot][:seen], known[:seen])

    def check_step(self, memory: ReqMemory, reqs: list[Req], slots: torch.Tensor, width: int) -> None:
        table = torch.cat([memory.req_pool.read(req.req_pool_idx, 0, req.kv_allocated_len) for req in reqs])
        self.assertEqual(len(slots), len(reqs) * width)
        self.assertTrue(set(slots.tolist()) <= set(table.tolist()))
        for req, row in zip(reqs, slots.view(len(reqs), width), strict=True):
            first = req.kv_committed_len
            self.assertEqual(row.tolist(), memory.req_pool.read(req.req_pool_idx, first, first + width).tolist())
            offsets = [(first + j) % memory.page_size for j in range(width)]
            self.assertEqual((row % memory.page_size).tolist(), offsets)

    def check_owners(self, memory: ReqMemory, running: list[Req]) -> None:
        own = [
            memory.req_pool.read(req.req_pool_idx, req.cache_protected_len, req.kv_allocated_len)
            for req in running
            if req.req_pool_idx is not None
        ]
        held = torch.cat(own) if own else torch.empty(0, dtype=torch.int64)
        self.assertEqual(len(set(held.tolist())), len(held), "two requests own one slot")
        check_integrity(memory.tree, held)

    def test_slots_that_a_step_left_are_used_by_the_next(self) -> None:
        memory = make_memory(64, 1, 4)
        req = admitted(memory, "a", [1, 2, 3])
        first = memory.extend_step([req])
        self.assertEqual((req.kv_committed_len, req.kv_allocated_len), (3, 7))
        req.kv_committed_len += 1
        self.assertEqual(memory.missing_for_step([req]), 1)
        second = memory.extend_step([req])
        self.assertEqual(second[:3].tolist(), first[1:].tolist())
        self.assertEqual(req.kv_allocated_len, 8)

    def test_more_tokens_and_a_step_after_them_are_counted_as_the_most_that_they_allocate(self) -> None:
        for page_size, width, ahead in ((1, 1, 0), (1, 4, 2), (4, 1, 0), (4, 2, 0), (4, 4, 2), (16, 2, 0), (3, 5, 1)):
            with self.subTest(page_size=page_size, width=width, ahead=ahead):
                memory = make_memory(96, page_size, width, ahead)
                req = admitted(memory, "a", [1, 2, 3])
                for more in range(12):
                    most = 0
                    for committed in range(1, 40):
                        req.kv_committed_len = committed
                        for req.kv_allocated_len in range(committed, committed + width + ahead + 1):
                            most = max(most, memory.missing_for([req], [committed + more + width + ahead]))
                    self.assertEqual(memory.with_step(more), most)

    def test_the_end_of_a_prompt_has_slots_ahead_and_a_chunk_has_none(self) -> None:
        memory = make_memory(64, 4, 4, 2)
        params = SamplingParams(max_new_tokens=CONTEXT)
        req = Req(TokenizedGenerateReqInput(rid="a", input_ids=[1] * 10, sampling_params=params), 0, frozenset())
        match = memory.match(req)
        memory.tree.inc_lock_ref(match.node)
        memory.admit(req, match)
        self.assertEqual(len(memory.extend([req], [8])), 8)
        self.assertEqual(req.kv_allocated_len, 8)
        req.kv_committed_len = 8
        self.assertEqual(memory.missing_for_extend([req], [10]), 4)
        slots = memory.extend([req], [10])
        self.assertEqual(slots.tolist(), memory.req_pool.read(req.req_pool_idx, 8, 10).tolist())
        self.assertEqual(req.kv_allocated_len, 12)

    def test_a_row_of_the_draft_layer_is_shared_with_the_token_behind_it(self) -> None:
        for width, starts in ((4, [0, 2, 3, 4]), (1, [0, 3, 4, 4])):
            with self.subTest(width=width):
                memory = make_memory(64, 1, width)
                prompts = ([1, 2, 3, 4, 5], [1, 2, 3, 9, 9], [1, 2, 3, 9, 8], [1, 2, 3, 9, 8])
                reqs = [admitted(memory, "a", prompt) for prompt in prompts]
                self.assertEqual([req.own_start for req in reqs], starts)
                self.check_owners(memory, reqs)
                for req in reqs:
                    memory.release(req, cache=True)
                memory.check_idle(deep=True)

    def test_what_was_never_committed_is_not_cached(self) -> None:
        memory = make_memory(64, 1, 4)
        req = admitted(memory, "a", [1, 2, 3])
        memory.extend_step([req])
        req.kv_committed_len += 2
        req.output_ids += [4, 5]
        memory.release(req, cache=True)
        self.assertEqual(memory.tree.total_size(), 5)
        memory.check_idle(deep=True)

    def test_a_slot_that_is_lost_is_noticed(self) -> None:
        memory = make_memory(64, 1, 4)
        req = admitted(memory, "a", [1, 2, 3])
        memory.extend_step([req])
        req.kv_allocated_len -= 1
        memory.release(req, cache=True)
        with self.assertRaisesRegex(PoolLeakError, "1 of 64"):
            memory.check_idle(deep=False)

    def test_a_width_below_one_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "step_width"):
            make_memory(64, 1, 0)


if __name__ == "__main__":
    unittest.main()
