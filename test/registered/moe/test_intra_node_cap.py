"""A receive cap under MORI's IntraNode kernel: dispatch and combine stay inside their buffers for every layout."""

from __future__ import annotations

import unittest

import numpy as np
import torch

from sglang.srt.layers.moe.token_dispatcher.base import EpConfig, ExchangeConfigError
from sglang.srt.layers.moe.token_dispatcher.capacity import plan_rounds, recv_capacity, source_limit
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_plan import choose_kernel, plan_exchange
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()

from mori.ops.addresses import last_combine_rows, last_dispatch_rows  # noqa: E402

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

LIMIT, PER_RANK, TOP_K = 6, 4, 3


def sizes_under(world: int, cap: int, **settings: bool) -> EpConfig:
    config = MoriConfig(world, LIMIT, max_recv_tokens=cap, **settings)
    return plan_exchange(config, choose_kernel(config), 0, world * PER_RANK, 16, TOP_K, torch.bfloat16)


def random_layouts(rng: np.random.Generator, world: int, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """(rows [n, W] that each rank brings, where they go [n, W, LIMIT, W]); idle ranks, lone ranks, one hot expert."""
    rows = rng.integers(0, LIMIT + 1, (count, world))
    rows[rng.random((count, world)) < 0.2] = 0
    lonely = rng.random(count) < 0.2
    rows[lonely] *= np.arange(world) == rng.integers(0, world, count)[lonely][:, None]
    ids = rng.integers(0, world * PER_RANK, (count, world, LIMIT, TOP_K))
    hot = rng.random(count) < 0.4
    ids[hot] = rng.integers(0, world * PER_RANK, hot.sum())[:, None, None, None]
    goes = (ids[..., None] // PER_RANK == np.arange(world)).any(3)
    return rows, torch.from_numpy(goes & (np.arange(LIMIT) < rows[..., None])[..., None])


def rounds_of(rows: np.ndarray, goes: torch.Tensor, capacity: int, limit: int) -> list[torch.Tensor]:
    """Where the rows of each round go, [n, W, LIMIT, W], counted from the first row of the round."""
    plans = [plan_rounds(tuple(each), capacity, limit) for each in rows.tolist()]
    parts = []
    for index in range(max(map(len, plans))):
        first, end = np.zeros_like(rows), np.zeros_like(rows)
        for i, plan in enumerate(plans):
            if index < len(plan):
                first[i], end[i] = plan[index].first, plan[index].end
        taken = torch.from_numpy(first[..., None] + np.arange(LIMIT))
        inside = (taken < torch.from_numpy(end)[..., None]).unsqueeze(-1)
        where = taken.clamp(max=LIMIT - 1).unsqueeze(-1).expand_as(goes)
        parts.append(goes.gather(2, where) & inside)
    return parts


class TestAddresses(CustomTestCase):
    def test_a_hundred_thousand_random_layouts(self):
        rng = np.random.default_rng(1)
        checked, outside, reached = 0, 0, 0
        torch.set_num_threads(1)
        cases = [(world, cap) for world in (2, 4, 8) for cap in range(world, world * LIMIT + 1)]
        for world, cap in cases:
            count = -(-100_000 // len(cases))
            rows, goes = random_layouts(rng, world, count)
            sizes = sizes_under(world, cap)
            limit, room = sizes.max_num_inp_token_per_rank, sizes.max_recv
            self.assertLessEqual(room, cap)
            travelled = torch.zeros_like(goes[..., 0], dtype=torch.int64).sum(-1)
            for part in rounds_of(rows, goes, room, limit):
                last = last_combine_rows(part, limit)
                self.assertLess(int(last_dispatch_rows(part).max()), room)
                self.assertLess(int(last.max()), room)
                reached += int((last == room - 1).sum())
                travelled += part.any(-1).sum(-1)
            self.assertTrue(torch.equal(travelled, goes.any(-1).sum(-1)), "every row travels once")
            # What a cap on the received rows alone would do: the buffer is capped, the rows of a source are not.
            capacity = recv_capacity(world, LIMIT, cap)
            for part in rounds_of(rows[:100], goes[:100], capacity, LIMIT):
                self.assertLess(int(last_dispatch_rows(part).max()), capacity)
                outside += int((last_combine_rows(part, LIMIT) >= capacity).any(-1).sum())
            checked += count
        self.assertGreaterEqual(checked, 100_000)
        self.assertGreater(outside, 2_000, "the layouts do not tell a cap that is safe from one that is not")
        self.assertGreater(reached, 5_000, "the last row is never used: the bound is not tight")

    def test_sizes(self):
        for world, cap, limit in ((8, 0, LIMIT), (8, 48, 6), (8, 47, 5), (8, 8, 1), (4, 9, 2), (1, 3, 3)):
            sizes = sizes_under(world, cap)
            self.assertEqual((sizes.max_num_inp_token_per_rank, sizes.max_recv), (limit, world * limit))
            self.assertEqual(sizes.max_total_recv_tokens, 0, "IntraNode is given no cap")
            self.assertEqual(source_limit(world, LIMIT, cap), limit)
        for world, cap in ((8, 7), (4, 1)):
            with self.assertRaisesRegex(ExchangeConfigError, f"={cap} is below {world}, one row of each rank"):
                sizes_under(world, cap)
        # AsyncLL stages by source in buffers that no cap shortens, and takes the cap itself.
        sizes = sizes_under(8, 9, low_latency=True)
        self.assertEqual((sizes.max_num_inp_token_per_rank, sizes.max_recv), (LIMIT, 16))

    def test_a_capped_buffer_cannot_be_planned(self):
        shared = dict(rank=0, world_size=4, hidden_dim=16, num_experts_per_rank=4, num_experts_per_token=2)
        types = dict(data_type=torch.bfloat16, combine_type=torch.bfloat16, max_num_inp_token_per_rank=LIMIT)
        for cap in (1, 4, 20):
            EpConfig(**shared, **types, max_total_recv_tokens=cap)
            with self.assertRaisesRegex(ExchangeConfigError, "needs 24 rows .* lower max_num_inp_token_per_rank"):
                EpConfig(**shared, **types, max_total_recv_tokens=cap, rows_by_source=True)
        for cap in (0, 21, 24):
            EpConfig(**shared, **types, max_total_recv_tokens=cap, rows_by_source=True)

    def test_the_suggested_cap_needs_one_round(self):
        rng = np.random.default_rng(2)
        for settings in ({}, {"low_latency": True}):
            for world in (2, 4, 8):
                sizes = sizes_under(world, 0, **settings)
                for rows in rng.integers(0, LIMIT + 1, (200, world)).tolist():
                    cap = sizes.least_cap(rows)
                    if not cap:
                        continue
                    enough = sizes_under(world, cap, **settings)
                    planned = plan_rounds(tuple(rows), enough.max_recv, enough.max_num_inp_token_per_rank)
                    self.assertEqual(len(planned), 1)
                    if cap > world:
                        fewer = sizes_under(world, cap - world, **settings)
                        planned = plan_rounds(tuple(rows), fewer.max_recv, fewer.max_num_inp_token_per_rank)
                        self.assertGreater(len(planned), 1)


if __name__ == "__main__":
    unittest.main()
