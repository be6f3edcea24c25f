"""The pools: shapes, round trips through slots, state copies, and bytes counted from the tensors themselves."""

import unittest
from dataclasses import replace

import torch

from sglang.kernels.ops.attention.kv_cache import write_kv_torch, write_latent_torch
from sglang.srt.configs.cache_layout import FULL, STATE, SWA, CacheLayout
from sglang.srt.mem_cache.allocator import SlotAccountingError
from sglang.srt.mem_cache.memory_pool import ModelPools, StateSlots
from sglang.srt.mem_cache.written_rows import WrittenRows
from sglang.test.cache_pools import kv_pools, latent_pools, pool_spec, state_slots
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestPools(CustomTestCase):
    def test_keys_and_values_round_trip(self) -> None:
        pool = kv_pools(20, 4, torch.float32, 2, 8, [3, 7])["kv"]
        slot_ids = torch.tensor([4, 23, 9])
        k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        write_kv_torch(k, v, *pool.layer(7), slot_ids)
        got_k, got_v = pool.layer(7)
        self.assertEqual(tuple(got_k.shape), (24, 2, 8))
        torch.testing.assert_close(got_k[slot_ids], k, rtol=0, atol=0)
        torch.testing.assert_close(got_v[slot_ids], v, rtol=0, atol=0)
        untouched = [i for i in range(24) if i not in slot_ids.tolist()]
        self.assertEqual(float(got_k[untouched].abs().sum() + got_v[untouched].abs().sum()), 0.0)
        other_k, other_v = pool.layer(3)
        self.assertEqual(float(other_k.abs().sum() + other_v.abs().sum()), 0.0)

    def test_latents_round_trip_in_their_dtype(self) -> None:
        pool = latent_pools(8, 1, torch.bfloat16, 16, [0, 1])["latent"]
        latent = torch.randn(2, 16)
        (got,) = pool.layer(1)
        write_latent_torch(latent, got, torch.tensor([1, 8]))
        self.assertEqual((tuple(got.shape), got.dtype), ((9, 16), torch.bfloat16))
        torch.testing.assert_close(got[[1, 8]], latent.bfloat16(), rtol=0, atol=0)
        self.assertEqual(float(pool.layer(0)[0].abs().sum()), 0.0)

    def test_what_is_not_there_is_named(self) -> None:
        pools = latent_pools(8, 1, torch.float32, 16, [1, 3])
        with self.assertRaisesRegex(KeyError, "'latent' holds layers .*, not layer 2"):
            pools["latent"].layer(2)
        with self.assertRaisesRegex(KeyError, "no pool 'kv', it keeps latent"):
            pools["kv"]
        with self.assertRaisesRegex(ValueError, "must differ"):
            latent_pools(8, 1, torch.float32, 16, [1, 1])

    def test_bytes_of_the_layout_are_those_of_the_tensors(self) -> None:
        pools = kv_pools(20, 4, torch.bfloat16, 2, 8, [3, 7, 9])
        self.assertEqual(pools.layout.num_bytes(FULL, 1), 2 * 2 * 8 * 3 * 2)
        self.assertEqual(sum(buffer.nbytes for buffer in pools.buffers()), pools.layout.num_bytes(FULL, 24))
        # DeepSeek-V3 in bf16: 61 layers of 512 + 64.
        self.assertEqual(latent_pools(1, 1, torch.bfloat16, 576, range(61)).layout.num_bytes(FULL, 1), 70272)

    def test_pools_follow_a_unit_by_a_ratio(self) -> None:
        """Byte pages of four tokens, and float32 rings per page of window tokens, at pages of four."""
        specs = (
            pool_spec("pages", FULL, [0, 1], {"bytes": (40,)}, torch.uint8),
            pool_spec("ring", SWA, [1], {"ring": (2, 3)}, torch.float32),
        )
        layout = CacheLayout(tuple(replace(spec, units_per_row=4) for spec in specs))
        self.assertEqual((layout.num_bytes(FULL, 8), layout.num_bytes(SWA, 8)), (2 * 2 * 40, 2 * 24))
        with self.assertRaisesRegex(ValueError, "no whole rows of pages"):
            layout.num_bytes(FULL, 6)
        pools = ModelPools(layout, {FULL: 16, SWA: 8}, 4, "cpu")
        self.assertEqual([tuple(buffer.shape) for buffer in pools.buffers()], [(2, 5, 40), (1, 4, 2, 3)])
        self.assertEqual([pools.size(unit) for unit in (FULL, SWA, STATE)], [16, 8, 0])

    def test_what_a_tombstone_stands_for_is_not_finite(self) -> None:
        specs = [pool_spec(name, unit, [0, 1], {name: (6,)}, dtype) for name, unit, dtype in (
            ("kv", FULL, torch.float32), ("rows", SWA, torch.bfloat16), ("f8", SWA, torch.float8_e4m3fn),
            ("fnuz", SWA, torch.float8_e4m3fnuz), ("bytes", SWA, torch.uint8),
        )]  # fmt: skip
        layout = CacheLayout((*specs[:4], replace(specs[4], units_per_row=4)))
        pools = ModelPools(layout, {FULL: 16, SWA: 8}, 4, "cpu")
        written = WrittenRows(pools, {FULL: 8, SWA: 4})
        for _ in range(2):
            self.assertFalse(bool(pools["kv"].buffers()[0].any()))
            self.assertTrue(bool((pools["bytes"].buffers()[0][:, 1] == 0xFF).all()))
            self.assertFalse(bool(pools["bytes"].buffers()[0][:, [0, 2, 3]].any()))
            for name in ("rows", "f8", "fnuz"):
                rows = pools[name].buffers()[0].float()
                self.assertEqual(rows[:, 4:8].isnan().all().item(), True, name)
                self.assertFalse(bool(rows[:, :4].any() or rows[:, 8:].any()), name)
            written.poison(1)
            written.clear()


class TestWrittenRows(CustomTestCase):
    def setUp(self) -> None:
        specs = (
            pool_spec("kv", FULL, [0, 1], {"k": (3,)}, torch.bfloat16),
            replace(pool_spec("pages", FULL, [0], {"bytes": (40,)}, torch.uint8), units_per_row=4),
            pool_spec("gdn", STATE, [0], {"ssm": (2, 2)}, torch.float32),
        )
        self.pools = ModelPools(CacheLayout(specs), {FULL: 16, STATE: 6}, 4, "cpu")
        self.rows = WrittenRows(self.pools, {FULL: 8, STATE: 3})

    def test_poison_is_finite_repeated_and_keeps_to_the_limits(self) -> None:
        self.rows.poison(1)
        before = [buffer.clone() for buffer in self.pools.buffers()]
        for buffer, rows in zip(before, (12, 3, 4), strict=True):
            self.assertTrue(bool(buffer[:, :rows].float().isfinite().all()))
            self.assertGreater(int(buffer[:, 1:rows].unique().numel()), 10)
            self.assertEqual(int(buffer[:, rows:].count_nonzero()), 0)
        for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16, torch.float32):
            packed = before[1].view(dtype).float()
            self.assertTrue(bool(packed.isfinite().all()) and float(packed.abs().max()) <= 4, dtype)
        self.rows.poison(2)
        self.assertFalse(any(torch.equal(a, b) for a, b in zip(before, self.pools.buffers(), strict=True)))
        self.rows.poison(1)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, self.pools.buffers(), strict=True)))
        self.rows.clear()
        self.assertFalse(any(bool(buffer.any()) for buffer in self.pools.buffers()))

    def test_every_row_past_the_dummies_has_a_fingerprint(self) -> None:
        before = self.rows.fingerprints()
        self.assertEqual([prints.numel() for prints in before], [8, 2, 3])  # tokens, pages, and states
        for number, (buffer, row) in enumerate(zip(self.pools.buffers(), (4, 1, 1), strict=True)):
            buffer[-1, row].view(-1)[-1] = 1
            after = self.rows.fingerprints()
            changed = [(a != b).nonzero().flatten().tolist() for a, b in zip(before, after, strict=True)]
            self.assertEqual(changed, [[0] if i == number else [] for i in range(3)])
            buffer.zero_()
            buffer[:, 0] = 1  # what padding writes does not count
            self.assertTrue(all(map(torch.equal, before, self.rows.fingerprints())))
            buffer.zero_()


class TestStateSlots(CustomTestCase):
    def setUp(self) -> None:
        self.slots, pool = state_slots(3, [0, 2], (10, 3), (3, 48, 32), torch.bfloat16, torch.float32)
        self.layers = [pool.layer(0), pool.layer(2)]

    def test_alloc_zeroes_and_never_gives_the_dummy(self) -> None:
        slots = self.slots
        self.assertEqual([slots.alloc() for _ in range(4)], [1, 2, 3, None])
        for conv, ssm in self.layers:
            conv[2] = ssm[2] = 5.0
            ssm[3] = 7.0
        slots.free(2)
        self.assertEqual(slots.available_size(), 1)
        self.assertEqual(slots.alloc(), 2)
        for conv, ssm in self.layers:
            self.assertEqual(float(conv[2].abs().sum() + ssm[2].abs().sum()), 0.0)
            self.assertTrue(bool((ssm[3] == 7.0).all()))

    def test_copy_takes_all_layers(self) -> None:
        src, dst = self.slots.alloc(), self.slots.alloc(zero=False)
        for conv, ssm in self.layers:
            conv[src], ssm[src] = torch.randn(10, 3).bfloat16(), torch.randn(3, 48, 32)
        self.slots.copy(src, dst)
        for conv, ssm in self.layers:
            self.assertGreater(float(ssm[dst].abs().sum()), 0.0)
            self.assertTrue(torch.equal(ssm[dst], ssm[src]))
            self.assertTrue(torch.equal(conv[dst], conv[src]))
        before = ssm[dst].clone()
        ssm[src] += 1
        self.assertTrue(torch.equal(ssm[dst], before))

    def test_refusals(self) -> None:
        slots = self.slots
        slot = slots.alloc()
        for bad in (0, -1, 2, 4):
            with self.assertRaises(SlotAccountingError):
                slots.free(bad)
            with self.assertRaises(SlotAccountingError):
                slots.copy(slot, bad)
            with self.assertRaises(SlotAccountingError):
                slots.copy(bad, slot)
        slots.free(slot)
        with self.assertRaisesRegex(SlotAccountingError, r"state slot 1 is not handed out \(state slots 1..3\)"):
            slots.free(slot)
        slots.alloc()
        slots.clear()
        self.assertEqual(slots.available_size(), 3)
        with self.assertRaisesRegex(ValueError, "at least one"):
            StateSlots(kv_pools(8, 1, torch.float32, 1, 1, [0]))


if __name__ == "__main__":
    unittest.main()
