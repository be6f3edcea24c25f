"""The pools: shapes, round trips through slots, state copies, and bytes counted from the tensors themselves."""

import unittest

import torch

from sglang.kernels.ops.attention.kv_cache import write_kv_torch, write_latent_torch
from sglang.srt.mem_cache.allocator import SlotAccountingError
from sglang.srt.mem_cache.memory_pool import GDNStatePool, MHATokenToKVPool, MLATokenToKVPool
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestKVPools(CustomTestCase):
    def test_mha_round_trip(self) -> None:
        pool = MHATokenToKVPool(20, 4, torch.float32, 2, 8, [3, 7], "cpu")
        slot_ids = torch.tensor([4, 23, 9])
        k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        write_kv_torch(k, v, *pool.get_kv_buffer(7), slot_ids)
        got_k, got_v = pool.get_kv_buffer(7)
        self.assertEqual(tuple(got_k.shape), (24, 2, 8))
        torch.testing.assert_close(got_k[slot_ids], k, rtol=0, atol=0)
        torch.testing.assert_close(got_v[slot_ids], v, rtol=0, atol=0)
        untouched = [i for i in range(24) if i not in slot_ids.tolist()]
        self.assertEqual(float(got_k[untouched].abs().sum() + got_v[untouched].abs().sum()), 0.0)
        other_k, other_v = pool.get_kv_buffer(3)
        self.assertEqual(float(other_k.abs().sum() + other_v.abs().sum()), 0.0)

    def test_mla_round_trip_and_dtype(self) -> None:
        pool = MLATokenToKVPool(8, 1, torch.bfloat16, 12, 4, [0, 1], "cpu")
        latent = torch.randn(2, 16)
        write_latent_torch(latent, pool.get_latent(1), torch.tensor([1, 8]))
        got = pool.get_latent(1)
        self.assertEqual((tuple(got.shape), got.dtype), ((9, 16), torch.bfloat16))
        torch.testing.assert_close(got[[1, 8]], latent.bfloat16(), rtol=0, atol=0)
        self.assertEqual(float(pool.get_latent(0).abs().sum()), 0.0)

    def test_unknown_layer(self) -> None:
        pool = MLATokenToKVPool(8, 1, torch.float32, 12, 4, [1, 3], "cpu")
        with self.assertRaisesRegex(KeyError, "not layer 2"):
            pool.get_latent(2)
        with self.assertRaisesRegex(ValueError, "must differ"):
            MLATokenToKVPool(8, 1, torch.float32, 12, 4, [1, 1], "cpu")

    def test_bytes(self) -> None:
        mha = MHATokenToKVPool(20, 4, torch.bfloat16, 2, 8, [3, 7, 9], "cpu")
        self.assertEqual(mha.row_bytes(), 2 * 2 * 8 * 3 * 2)
        self.assertEqual(sum(buffer.nbytes for buffer in mha.buffers()), 24 * mha.row_bytes())
        # DeepSeek-V3 in bf16: 61 layers of 512 + 64.
        self.assertEqual(MLATokenToKVPool(1, 1, torch.bfloat16, 512, 64, range(61), "meta").row_bytes(), 70272)


class TestGDNStatePool(CustomTestCase):
    def make(self, num_slots: int = 3) -> GDNStatePool:
        return GDNStatePool(num_slots, [0, 2], 10, 4, 3, 48, 32, torch.bfloat16, torch.float32, "cpu")

    def test_shapes(self) -> None:
        pool = self.make()
        self.assertEqual((tuple(pool.conv(2).shape), pool.conv(2).dtype), ((4, 10, 3), torch.bfloat16))
        self.assertEqual((tuple(pool.ssm(2).shape), pool.ssm(2).dtype), ((4, 3, 48, 32), torch.float32))
        with self.assertRaisesRegex(KeyError, "not layer 1"):
            pool.ssm(1)

    def test_alloc_zeroes_and_never_gives_the_dummy(self) -> None:
        pool = self.make()
        first = [pool.alloc() for _ in range(4)]
        self.assertEqual(first, [1, 2, 3, None])
        for layer in (0, 2):
            pool.conv(layer)[2] = 5.0
            pool.ssm(layer)[2] = 5.0
            pool.ssm(layer)[3] = 7.0
        pool.free(2)
        self.assertEqual(pool.available_size(), 1)
        self.assertEqual(pool.alloc(), 2)
        for layer in (0, 2):
            self.assertEqual(float(pool.conv(layer)[2].abs().sum() + pool.ssm(layer)[2].abs().sum()), 0.0)
            self.assertTrue(bool((pool.ssm(layer)[3] == 7.0).all()))

    def test_copy_takes_all_layers(self) -> None:
        pool = self.make()
        src, dst = pool.alloc(), pool.alloc(zero=False)
        for layer in (0, 2):
            pool.conv(layer)[src] = torch.randn(10, 3).bfloat16()
            pool.ssm(layer)[src] = torch.randn(3, 48, 32)
        pool.copy(src, dst)
        for layer in (0, 2):
            self.assertGreater(float(pool.ssm(layer)[dst].abs().sum()), 0.0)
            self.assertTrue(torch.equal(pool.ssm(layer)[dst], pool.ssm(layer)[src]))
            self.assertTrue(torch.equal(pool.conv(layer)[dst], pool.conv(layer)[src]))
        before = pool.ssm(0)[dst].clone()
        pool.ssm(0)[src] += 1
        self.assertTrue(torch.equal(pool.ssm(0)[dst], before))

    def test_refusals(self) -> None:
        pool = self.make()
        slot = pool.alloc()
        for bad in (0, -1, 2, 4):
            with self.assertRaises(SlotAccountingError):
                pool.free(bad)
            with self.assertRaises(SlotAccountingError):
                pool.copy(slot, bad)
            with self.assertRaises(SlotAccountingError):
                pool.copy(bad, slot)
        pool.free(slot)
        with self.assertRaisesRegex(SlotAccountingError, "state slot 1 is not handed out"):
            pool.free(slot)
        pool.alloc()
        pool.clear()
        self.assertEqual(pool.available_size(), 3)

    def test_bytes(self) -> None:
        pool = self.make(3)
        self.assertEqual(pool.row_bytes(), 2 * (10 * 3 * 2 + 3 * 48 * 32 * 4))
        self.assertEqual(sum(buffer.nbytes for buffer in pool.buffers()), 4 * pool.row_bytes())
        # Qwen3.5-35B-A3B: 30 layers of 48 KiB convolution (bf16) and 2 MiB state (fp32).
        large = GDNStatePool(1, range(30), 8192, 4, 32, 128, 128, torch.bfloat16, torch.float32, "meta")
        self.assertEqual(large.row_bytes(), 30 * (48 * 1024 + 2 * 1024 * 1024))


if __name__ == "__main__":
    unittest.main()
