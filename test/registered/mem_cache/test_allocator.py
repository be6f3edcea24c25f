"""The slot allocator against a Python set, at page sizes 1, 4 and 16, and the request table."""

import random
import unittest

import torch
from torch.overrides import TorchFunctionMode

from sglang.srt.mem_cache.allocator import ReqToTokenPool, SlotAccountingError, TokenToKVPoolAllocator
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")


def slots(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


class SetTruth:
    """Pages in use and the slots of each, as plain sets."""

    def __init__(self, allocator: TokenToKVPoolAllocator):
        self.allocator = allocator
        self.page = allocator.page_size
        self.used: dict[int, set[int]] = {}

    def take(self, ids: list[int]) -> None:
        for slot in ids:
            assert self.page <= slot < self.allocator.size + self.page, f"slot {slot} is outside the pool"
            of_page = self.used.setdefault(slot // self.page, set())
            assert slot not in of_page, f"slot {slot} was handed out twice"
            of_page.add(slot)

    def give(self, ids: list[int]) -> None:
        for slot in ids:
            self.used.pop(slot // self.page, None)

    def available(self) -> int:
        return self.allocator.size - len(self.used) * self.page


class TestRandomUse(CustomTestCase):
    def check_layout(self, held: list[int], page: int) -> None:
        for position, slot in enumerate(held):
            self.assertEqual(slot % page, position % page)
            if position % page:
                self.assertEqual(slot, held[position - 1] + 1)

    def simulate(self, page: int, seed: int, steps: int = 1200) -> None:
        rng = random.Random(seed)
        allocator = TokenToKVPoolAllocator(24 * page, page)
        truth = SetTruth(allocator)
        requests: list[list[int]] = []
        refusals = 0
        for _ in range(steps):
            before = allocator.free_slots().tolist()
            action = rng.choice(["extend", "extend", "decode", "decode", "decode", "free", "alloc"])
            if action == "free" and requests:
                gone = requests.pop(rng.randrange(len(requests)))
                allocator.free(slots(*gone))
                truth.give(gone)
            elif action == "alloc":
                got = allocator.alloc(rng.randint(0, 4) * page)
                if got is not None:
                    truth.take(got.tolist())
                    self.check_layout(got.tolist(), page)
                    requests.append(got.tolist())
            elif action == "extend":
                chosen = rng.sample(requests, min(len(requests), rng.randint(0, 2))) + [[] for _ in range(2)]
                ends = [len(r) + rng.randint(0, 3 * page) for r in chosen]
                last = [r[-1] if r else -1 for r in chosen]
                got = allocator.alloc_extend([len(r) for r in chosen], ends, last)
                pages = sum(-(-e // page) - -(-len(r) // page) for r, e in zip(chosen, ends))
                self.assertEqual(got is None, pages * page > len(before))
                if got is None:
                    refusals += 1
                    self.assertEqual(allocator.free_slots().tolist(), before)
                    continue
                truth.take(got.tolist())
                rest = got.tolist()
                for request, end in zip(chosen, ends):
                    count = end - len(request)
                    request += rest[:count]
                    rest = rest[count:]
                    self.check_layout(request, page)
                self.assertEqual(rest, [])
                requests += [r for r in chosen if r and not any(r is known for known in requests)]
            elif action == "decode" and requests:
                chosen = rng.sample(requests, rng.randint(1, len(requests)))
                chosen = [r for r in chosen if r]
                got = allocator.alloc_decode([len(r) + 1 for r in chosen], [r[-1] for r in chosen])
                pages = sum(len(r) % page == 0 for r in chosen)
                self.assertEqual(got is None, pages * page > len(before))
                if got is None:
                    refusals += 1
                    self.assertEqual(allocator.free_slots().tolist(), before)
                    continue
                truth.take(got.tolist())
                for request, slot in zip(chosen, got.tolist()):
                    request.append(slot)
                    self.check_layout(request, page)
            self.assertEqual(allocator.available_size(), truth.available())
            free = set(allocator.free_slots().tolist())
            self.assertEqual(len(free), allocator.available_size())
            self.assertFalse(free & {slot for request in requests for slot in request})
            self.assertEqual(allocator.available_size(), len(free))
        self.assertGreater(refusals, 10)
        for request in requests:
            allocator.free(slots(*request))
        self.assertEqual(allocator.free_slots().tolist(), list(range(page, 25 * page)))

    def test_page_1(self) -> None:
        self.simulate(1, seed=1)

    def test_page_4(self) -> None:
        self.simulate(4, seed=2)

    def test_page_16(self) -> None:
        self.simulate(16, seed=3)

    def test_same_calls_give_same_slots(self) -> None:
        seen = []
        for _ in range(2):
            allocator = TokenToKVPoolAllocator(64, 4)
            first = allocator.alloc_extend([0, 0], [6, 3], [-1, -1])
            allocator.free(first[:6])
            second = allocator.alloc(12)
            seen.append((first.tolist(), second.tolist()))
        self.assertEqual(seen[0], seen[1])
        self.assertEqual(seen[0][0], [4, 5, 6, 7, 8, 9, 12, 13, 14])


class TestRefusals(CustomTestCase):
    def assert_refused(self, allocator: TokenToKVPoolAllocator, ids: torch.Tensor, message: str) -> None:
        before = allocator.free_slots().tolist()
        with self.assertRaisesRegex(SlotAccountingError, message):
            allocator.free(ids)
        self.assertEqual(allocator.free_slots().tolist(), before)

    def test_double_free(self) -> None:
        for page in (1, 4):
            allocator = TokenToKVPoolAllocator(8 * page, page)
            got = allocator.alloc(3 * page)
            allocator.free(got[:page])
            self.assert_refused(allocator, got[:page], "already free")
            self.assert_refused(allocator, got, "already free")
            self.assert_refused(allocator, torch.cat([got[page:], got[page:]]), "twice in one free")

    def test_foreign_slots(self) -> None:
        for page in (1, 4):
            allocator = TokenToKVPoolAllocator(8 * page, page)
            got = allocator.alloc(2 * page)
            for bad in (0, page - 1, -1, 9 * page):
                self.assert_refused(allocator, torch.cat([got, slots(bad)]), "outside")
            self.assert_refused(allocator, slots(5 * page), "already free")

    def test_part_of_a_page(self) -> None:
        allocator = TokenToKVPoolAllocator(32, 8)
        got = allocator.alloc_extend([0], [13], [-1])
        self.assert_refused(allocator, got[:12], "page 2 has 5 slots in use and 4 were freed")
        self.assert_refused(allocator, torch.cat([got, slots(21)]), "page 2 has 5 slots in use and 6 were freed")
        allocator.free(got)
        self.assertEqual(allocator.available_size(), 32)

    def test_partial_page_has_one_writer(self) -> None:
        allocator = TokenToKVPoolAllocator(32, 8)
        got = allocator.alloc_extend([0], [5], [-1]).tolist()
        for call in (
            lambda: allocator.alloc_decode([5], [got[3]]),  # not the newest slot
            lambda: allocator.alloc_decode([7], [got[4]]),  # position and offset disagree
            lambda: allocator.alloc_decode([6, 6], [got[4], got[4]]),  # two requests in one page
            lambda: allocator.alloc_decode([6], [-1]),
            lambda: allocator.alloc_extend([5], [9], [20]),  # a page that is free
        ):
            with self.assertRaises(SlotAccountingError):
                call()
        self.assertEqual(allocator.alloc_decode([6], [got[4]]).tolist(), [got[4] + 1])

    def test_bad_arguments(self) -> None:
        for size, page in ((0, 1), (10, 4), (4, 0), (2**31, 1)):
            with self.assertRaises(ValueError):
                TokenToKVPoolAllocator(size, page)
        allocator = TokenToKVPoolAllocator(8, 4)
        with self.assertRaisesRegex(ValueError, "multiple of page_size 4"):
            allocator.alloc(5)
        with self.assertRaises(ValueError):
            allocator.alloc_extend([5], [3], [-1])

    def test_empty_calls_and_clear(self) -> None:
        allocator = TokenToKVPoolAllocator(8, 4)
        self.assertEqual(allocator.alloc(0).numel(), 0)
        self.assertEqual(allocator.alloc_decode([], []).numel(), 0)
        self.assertEqual(allocator.alloc_extend([], [], []).numel(), 0)
        allocator.free(slots())
        allocator.alloc(8)
        self.assertIsNone(allocator.alloc(4))
        allocator.clear()
        self.assertEqual(allocator.alloc(8).tolist(), list(range(4, 12)))


class TestReqToTokenPool(CustomTestCase):
    def test_rows(self) -> None:
        pool = ReqToTokenPool(3, 10, "cpu")
        rows = [pool.alloc() for _ in range(4)]
        self.assertEqual(rows, [0, 1, 2, None])
        pool.free(1)
        self.assertEqual(pool.available_size(), 1)
        with self.assertRaisesRegex(SlotAccountingError, "row 1"):
            pool.free(1)
        with self.assertRaises(SlotAccountingError):
            pool.write(1, 0, slots(4))
        for row in (1, 3, -1):
            with self.assertRaisesRegex(SlotAccountingError, f"row {row} is not handed out"):
                pool.write_decode([0, row], [0, 0], slots(4, 5))
        self.assertEqual(pool.read(0, 0, 1).tolist(), [0])
        self.assertEqual(pool.alloc(), 1)

    def test_write_and_read(self) -> None:
        pool = ReqToTokenPool(3, 10)
        a, b = pool.alloc(), pool.alloc()
        pool.write(a, 0, slots(7, 8, 9))
        pool.write(a, 3, slots(4))
        pool.write_decode([a, b], [4, 0], slots(11, 12))
        self.assertEqual(pool.read(a, 0, 5).tolist(), [7, 8, 9, 4, 11])
        self.assertEqual(pool.read(a, 1, 3).dtype, torch.int64)
        self.assertEqual(pool.req_to_token[b, :1].tolist(), [12])
        self.assertEqual(pool.req_to_token.dtype, torch.int32)
        copy = pool.read(a, 0, 2)
        copy[0] = 99
        self.assertEqual(pool.read(a, 0, 1).tolist(), [7])

    def test_write_extend_gives_each_row_its_part(self) -> None:
        pool = ReqToTokenPool(3, 10)
        a, b, c = (pool.alloc() for _ in range(3))
        pool.write(b, 0, slots(20))
        pool.write_extend([c, a, b], [0, 0, 1], [2, 0, 4], slots(1, 2, 21, 22, 23))
        self.assertEqual([pool.read(c, 0, 3).tolist(), pool.read(a, 0, 1).tolist()], [[1, 2, 0], [0]])
        self.assertEqual(pool.req_to_token[b, :5].tolist(), [20, 21, 22, 23, 0])

    def test_no_write_waits_for_the_step_that_runs(self) -> None:
        waits: list[bool] = []

        class Copies(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                kwargs = kwargs or {}
                if func is torch.Tensor.to and any(isinstance(arg, torch.device) for arg in args):
                    waits.append(not kwargs.get("non_blocking", False))
                return func(*args, **kwargs)

        pool = ReqToTokenPool(2, 10, "meta")
        rows = [pool.alloc(), pool.alloc()]
        with Copies():
            pool.write_extend(rows, [0, 0], [2, 1], slots(7, 8, 9))
            pool.write_decode(rows, [2, 1], slots(11, 12))
        self.assertEqual(waits, [False], "one copy that nothing waits for; a decode step writes its own slots")
        self.assertEqual(pool.read(rows[0], 0, 3).tolist(), [7, 8, 11])

    def test_leaving_the_context(self) -> None:
        pool = ReqToTokenPool(1, 4)
        pool.alloc()
        with self.assertRaisesRegex(ValueError, "context of 4"):
            pool.write(0, 3, slots(5, 6))
        with self.assertRaises(ValueError):
            pool.write_decode([0], [4], slots(5))
        with self.assertRaises(ValueError):
            pool.read(0, 3, 2)


if __name__ == "__main__":
    unittest.main()
