"""Receive capacity, rounds and the experts' input: proven on every small world and on 100,000 larger ones."""

from __future__ import annotations

import itertools
import unittest

import numpy as np

from sglang.srt.layers.moe.token_dispatcher.capacity import (
    ROW_TIERS,
    input_bound,
    input_rows,
    plan_rounds,
    recv_capacity,
    rows_of_ranks,
    slice_of,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")


def mori_capacity(world, limit, cap):
    """MORI's rounding in another form: the cap goes up to a multiple of the world, and not past the worst case."""
    worst = world * limit
    if cap == 0:
        return worst
    while cap % world:
        cap += 1
    return min(cap, worst)


class TestPureFunctions(CustomTestCase):
    def test_capacity(self):
        for world, limit in itertools.product((1, 2, 3, 8), (1, 5, 16)):
            for cap in range(0, world * limit + 1):
                self.assertEqual(recv_capacity(world, limit, cap), mori_capacity(world, limit, cap))
        self.assertEqual(recv_capacity(8, 4096, 100), 104)

    def test_slices_part_the_rows(self):
        for rows, parts in itertools.product(range(12), range(1, 6)):
            spans = [slice_of(rows, part, parts) for part in range(parts)]
            covered = [row for first, end in spans for row in range(first, end)]
            self.assertEqual(covered, list(range(rows)))
            self.assertEqual(rows_of_ranks([rows], parts), tuple(end - first for first, end in spans))

    def check_rounds(self, rows, capacity, limit):
        rounds = plan_rounds(tuple(rows), capacity, limit)
        for rank, count in enumerate(rows):
            covered = [row for part in rounds for row in range(part.first[rank], part.end[rank])]
            self.assertEqual(covered, list(range(count)))
        for part in rounds:
            self.assertLessEqual(sum(part.rows), capacity)
            self.assertLessEqual(max(part.rows), limit)
        self.assertGreaterEqual(len(rounds) * capacity, sum(rows))
        return rounds

    def test_rounds_of_every_small_world(self):
        for world in (1, 2, 3, 4):
            for limit in (1, 2, 3):
                for cap in range(0, world * limit + 1):
                    capacity = recv_capacity(world, limit, cap)
                    for rows in itertools.product(range(4), repeat=world):
                        rounds = self.check_rounds(rows, capacity, limit)
                        if sum(rows) <= capacity and max(rows) <= limit:
                            self.assertEqual(len(rounds), int(sum(rows) > 0))
        with self.assertRaisesRegex(ValueError, "cannot serve 4 ranks"):
            plan_rounds((1, 1, 1, 1), 3, 1)

    def test_input_rows(self):
        for kind, tiers in ROW_TIERS.items():
            self.assertEqual(list(tiers), sorted(set(tiers)), kind)
            for bound, capacity in itertools.combinations_with_replacement(range(1, 150, 7), 2):
                rows = input_rows(bound, capacity, tiers)
                self.assertTrue(bound <= rows <= capacity)
                self.assertTrue(rows in tiers or rows in (bound, capacity))
                for manual in (1, bound, bound + 3, 10_000):
                    cut = input_rows(bound, capacity, tiers, manual)
                    self.assertTrue(bound <= cut <= rows and (cut <= manual or cut == bound))
        self.assertEqual(input_rows(40, 4096, ROW_TIERS["hip"]), 64)
        self.assertEqual(input_rows(40, 4096, ROW_TIERS["hip"], manual=48), 48)
        self.assertEqual(input_rows(40, 4096, ROW_TIERS["hip"], manual=8), 40)


def received(tokens_of_ranks, experts_per_rank, world):
    """Rows that each rank gets, token by token: one per token and rank."""
    counts = [0] * world
    for tokens in tokens_of_ranks:
        for ids in tokens:
            for rank in {expert // experts_per_rank for expert in ids}:
                counts[rank] += 1
    return counts


class TestBoundAgainstBruteForce(CustomTestCase):
    def test_every_placement_of_three_tokens(self):
        """Up to three tokens anywhere in worlds of up to four ranks and 8 experts, every pair of experts each."""
        checked = 0
        for world in (1, 2, 4):
            per_rank = 8 // world
            pairs = list(itertools.combinations(range(8), 2))
            # Pairs that go to the same ranks are alike.
            choices = list({frozenset(e // per_rank for e in pair): pair for pair in pairs}.values())
            for count in range(4):
                for places in itertools.combinations_with_replacement(range(world), count):
                    rows = [places.count(rank) for rank in range(world)]
                    for chosen in itertools.product(choices, repeat=count):
                        tokens = [[] for _ in range(world)]
                        for rank, ids in zip(places, chosen):
                            tokens[rank].append(ids)
                        for cap in {0, 1, count}:
                            capacity = recv_capacity(world, 3, cap)
                            for part in plan_rounds(tuple(rows), capacity, 3):
                                cut = [t[a:b] for t, a, b in zip(tokens, part.first, part.end)]
                                bound = input_bound(part.rows, capacity)
                                self.assertLessEqual(max(received(cut, per_rank, world)), bound)
                                self.assertLessEqual(bound, capacity)
                                checked += 1
        self.assertGreater(checked, 10_000)

    def test_the_bound_is_reached(self):
        """All to one rank: a bound that is one lower would be wrong."""
        for rows in itertools.product(range(4), repeat=4):
            counts = received([[(6, 7)] * n for n in rows], 2, 4)
            self.assertEqual(max(counts), input_bound(rows, 12))

    def test_a_hundred_thousand_random_worlds(self):
        rng = np.random.default_rng(0)
        total = 0
        for world, worlds in ((2, 20_000), (4, 20_000), (8, 30_000), (16, 20_000), (32, 10_000)):
            self.check_worlds(rng, world, worlds)
            total += worlds
        self.assertEqual(total, 100_000)

    def check_worlds(self, rng, world, worlds):
        limit, top_k, per_rank = 6, 4, 4
        rows = rng.integers(0, limit + 1, (worlds, world))
        rows[rng.random((worlds, world)) < 0.2] = 0  # idle ranks
        lonely = rng.random(worlds) < 0.1  # one rank has all the work
        rows[lonely] *= np.arange(world) == rng.integers(0, world, worlds)[lonely][:, None]
        real = (rows * rng.choice([1.0, 1.0, rng.random()], (worlds, world))).astype(int)  # the rest is padding
        ids = rng.integers(0, world * per_rank, (worlds, world, limit, top_k))
        hot = rng.random(worlds) < 0.3  # all to one rank
        ids[hot] = rng.integers(0, world * per_rank, hot.sum())[:, None, None, None]
        token = np.arange(limit)
        padding = token >= real[:, :, None]
        owners = np.where(padding[..., None], np.arange(world)[None, :, None, None], ids // per_rank)
        goes = (owners[..., None] == np.arange(world)).any(3) & (token < rows[:, :, None])[..., None]
        caps = rng.integers(0, world * limit + 1, worlds)
        capacities = np.array([recv_capacity(world, limit, int(cap)) for cap in caps])
        plans = [plan_rounds(tuple(r), int(c), limit) for r, c in zip(rows.tolist(), capacities)]
        for index in range(max(map(len, plans))):
            first, end = np.zeros((worlds, world), int), np.zeros((worlds, world), int)
            for i, plan in enumerate(plans):
                if index < len(plan):
                    first[i], end[i] = plan[index].first, plan[index].end
            inside = (token >= first[:, :, None]) & (token < end[:, :, None])
            counts = (goes & inside[..., None]).sum((1, 2))
            # Padding counts for its own rank alone.
            real_rows = (inside & ~padding).sum(2)
            sources = real_rows.sum(1, keepdims=True) - real_rows + (end - first)
            self.assertTrue((counts <= sources).all())
            self.assertTrue((sources <= capacities[:, None]).all())
        for i in rng.integers(0, worlds, 50):
            own = rows[i].tolist()
            self.assertEqual(input_bound(own, int(capacities[i])), min(sum(own), capacities[i]))
        covered = np.array([[sum(part.rows[r] for part in plan) for r in range(world)] for plan in plans])
        self.assertTrue((covered == rows).all())


if __name__ == "__main__":
    unittest.main()
