"""Triton attention on a GPU at served widths: against the references, over splits, in graphs, through the backend.

Its CPU siblings are test_triton_attention.py (the same bodies, interpreted) and layers/test_triton_backend.py.
"""

import unittest
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from sglang.kernels.ops.activation.sigmoid_mul import sigmoid_mul_triton
from sglang.kernels.ops.attention import extend_ragged
from sglang.kernels.ops.attention.attention_state import extend_state, merge_states
from sglang.kernels.ops.attention.decode_attention import decode_attention_torch
from sglang.kernels.ops.attention.launchers import launch_decode, launch_extend
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.registry import REGISTRY
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.attention.torch_native_backend import TorchNativeGqaBackend
from sglang.srt.layers.attention.triton_backend import TritonGqaBackend
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ForwardMode, ModelWorkerBatch
from sglang.srt.platforms import current_platform, override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.test.cache_pools import kv_pools
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.op_cases.attention import expanded_views, indptr
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd-mi35x")

DEVICE = "cuda"
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Query heads, key heads, key width, value width; a latent row (rank 512) is its own value.
LAYOUTS = ((16, 2, 256, 256), (32, 8, 128, 128), (6, 2, 96, 96), (4, 4, 64, 64))
LATENT_HEADS = (16, 32, 128)


def error(found, wanted):
    """Relative error of the whole tensor; infinite when anything is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def decode_inputs(heads, kv_heads, dim, value, dtype, lens=(1, 0, 300, 1500, 64)):
    generator = torch.Generator().manual_seed(heads)
    total = sum(lens) + 2
    table = torch.full((len(lens) + 1, 2048), total - 1, dtype=torch.int32)
    order = torch.randperm(total - 2, generator=generator).int() + 1
    start = 0
    for row, length in enumerate(lens):
        table[row + 1, :length] = order[start : start + length]
        start += length
    q = torch.randn(len(lens), heads, dim, generator=generator).to(DEVICE, dtype)
    k = torch.randn(total, kv_heads, dim, generator=generator).to(DEVICE, dtype)
    v = torch.randn(total, kv_heads, value, generator=generator).to(DEVICE, dtype)
    k[-1], v[-1] = float("nan"), float("nan")
    rows = torch.arange(len(lens), device=DEVICE) + 1
    return q, k, v, table.to(DEVICE), rows, torch.tensor(lens, device=DEVICE)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestDecodeOnGpu(CustomTestCase):
    def check(self, q, k, v, *table, shape, dtype):
        wide = [tensor.float() for tensor in (q, k, v)]
        if shape.value_is_key:
            wanted = decode_attention_torch(wide[0], wide[1], None, *table, 0.06, shape.value)
        else:
            wanted = decode_attention_torch(*wide, *table, 0.06)
        for splits in (None, 1, 2, 7):
            with self.subTest(shape=shape, heads=q.shape[1], dtype=dtype, splits=splits):
                found = launch_decode(q, k, v, *table, 0.06, shape, splits=splits)
                again = launch_decode(q, k, v, *table, 0.06, shape, splits=splits)
                self.assertLess(error(found, wanted), BOUNDS[dtype])
                self.assertTrue(torch.equal(found, again), "two runs differ")
                self.assertEqual(float(found[1].abs().max()), 0.0)

    def test_grouped_heads(self):
        for dtype in BOUNDS:
            for heads, kv_heads, dim, value in LAYOUTS:
                inputs = decode_inputs(heads, kv_heads, dim, value, dtype)
                self.check(*inputs, shape=RowShape.of(dim, value), dtype=dtype)

    def test_a_gate_is_what_the_next_op_would_make_of_it(self):
        for dtype in BOUNDS:
            for repeat, lens in ((1, (1, 0, 300, 1500, 64)), (4, (4, 5, 300, 1500, 64))):
                q, k, v, *table = decode_inputs(16, 2, 256, 256, dtype, lens)
                q = q.repeat_interleave(repeat, 0)
                gate = torch.randn(len(q), 16, 2, 256, device=DEVICE).to(dtype)[:, :, 1] * 3
                gate[0, 3, 5], gate[1, 2, 7], gate[1, 2, 8] = float("nan"), float("inf"), float("-inf")
                for splits in (None, 1, 2, 7):
                    with self.subTest(dtype=dtype, repeat=repeat, splits=splits):
                        args = (q, k, v, *table, 0.06, RowShape.of(256, 256), None, splits, repeat)
                        found, apart = launch_decode(*args, gate=gate), sigmoid_mul_triton(launch_decode(*args), gate)
                        self.assertTrue(torch.equal(found.nan_to_num(9.0), apart.nan_to_num(9.0)))
                        self.assertTrue(bool(found[0, 3, 5].isnan()))

    def test_latent_rows(self):
        for dtype in BOUNDS:
            for heads in LATENT_HEADS:
                q, k, _, *table = decode_inputs(heads, 1, 576, 512, dtype)
                self.check(q, k, k, *table, shape=RowShape.of(576, 512, value_is_key=True), dtype=dtype)

    def test_eight_bit_caches(self):
        q, *cache, table, rows, lens = decode_inputs(16, 2, 256, 256, torch.bfloat16)
        coarse = [tensor.to(fp8_dtype(current_platform.arch)) for tensor in cache]
        self.check(q, *coarse, table, rows, lens, shape=RowShape.of(256, 256), dtype=torch.bfloat16)
        for heads in LATENT_HEADS:
            q, k, _, *table = decode_inputs(heads, 1, 576, 512, torch.bfloat16)
            k = k.to(fp8_dtype(current_platform.arch))
            self.check(q, k, k, *table, shape=RowShape.of(576, 512, value_is_key=True), dtype=torch.bfloat16)

    def test_replay_follows_lengths_on_the_device(self):
        for heads in (16, 128):
            with self.subTest(heads=heads):
                self.check_replay(heads)

    def check_replay(self, heads):
        shape = RowShape.of(576, 512, value_is_key=True)
        q, k, _, table, rows, lens = decode_inputs(heads, 1, 576, 512, torch.bfloat16)
        launch_decode(q, k, k, table, rows, lens, 0.06, shape)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = launch_decode(q, k, k, table, rows, lens, 0.06, shape)
        for change in ([1, 0, 300, 1500, 64], [1, 0, 2, 3, 64], [0, 0, 0, 0, 0], [1, 0, 299, 1400, 63]):
            lens.copy_(torch.tensor(change))
            out.fill_(float("nan"))
            graph.replay()
            eager = launch_decode(q, k, k, table, rows, lens, 0.06, shape)
            self.assertTrue(bool(eager.isfinite().all()))
            self.assertTrue(torch.equal(out, eager))


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestExtendOnGpu(CustomTestCase):
    Q_LENS, KV_LENS = (1, 130, 0, 300, 17), (40, 500, 3, 300, 1100)

    def inputs(self, heads, kv_heads, dim, value, dtype):
        generator = torch.Generator().manual_seed(heads)
        total = sum(self.KV_LENS)
        q = torch.randn(sum(self.Q_LENS), heads, dim, generator=generator).to(DEVICE, dtype)
        k = torch.randn(total + 5, kv_heads, dim, generator=generator).to(DEVICE, dtype)
        v = torch.randn(total + 5, kv_heads, value, generator=generator).to(DEVICE, dtype)
        slots = torch.randperm(total + 5, generator=generator)[:total].to(DEVICE)
        bounds = [indptr(list(lens)).to(DEVICE) for lens in (self.Q_LENS, self.KV_LENS)]
        return q, k, v, slots, bounds

    def test_slots_and_packed_rows(self):
        for dtype in BOUNDS:
            for heads, kv_heads, dim, value in (*LAYOUTS, (16, 16, 192, 128)):
                q, k, v, slots, bounds = self.inputs(heads, kv_heads, dim, value, dtype)
                wide = (q.float(), k[slots].float(), v[slots].float())
                wanted = extend_ragged.extend_ragged_torch(*wide, *bounds, 0.07)
                shape = RowShape.of(dim, value)
                with self.subTest(heads=heads, dim=dim, dtype=dtype):
                    for splits in (None, 1, 3):
                        found, _ = launch_extend(q, k, v, slots, *bounds, 0.07, shape, splits=splits)
                        self.assertLess(error(found, wanted), BOUNDS[dtype])
                    found, _ = launch_extend(q, k[slots], v[slots], None, *bounds, 0.07, shape)
                    self.assertLess(error(found, wanted), BOUNDS[dtype])

    def test_latent_rows(self):
        for dtype in BOUNDS:
            for heads in (16, 128):
                q, k, _, slots, bounds = self.inputs(heads, 1, 576, 1, dtype)
                rows = k[slots].float()
                wanted = extend_ragged.extend_ragged_torch(q.float(), rows, rows[..., :512], *bounds, 0.06)
                shape = RowShape.of(576, 512, value_is_key=True)
                for splits in (None, 1, 4):
                    with self.subTest(heads=heads, dtype=dtype, splits=splits):
                        found, _ = launch_extend(q, k, k, slots, *bounds, 0.06, shape, splits=splits)
                        self.assertLess(error(found, wanted), BOUNDS[dtype])

    def test_a_tail_that_all_heads_share(self):
        for dtype in BOUNDS:
            q, k, latent, slots, bounds = self.inputs(16, 16, 192, 576, dtype)
            kv = torch.cat((k, k[..., :64] * 2), dim=-1)[slots]
            k, v, tail = expanded_views(kv, latent[slots, 0], 128, 64)
            joined, rest = extend_ragged.join_tail(k, tail), (v, *bounds, 0.07)
            with self.subTest(dtype=dtype):
                wanted = extend_ragged.extend_ragged_torch(q.float(), joined.float(), v.float(), *rest[1:])
                self.assertLess(error(extend_ragged.extend_ragged_triton(q, k, *rest, tail), wanted), BOUNDS[dtype])
                apart, whole = extend_state(q, k, *rest, True, tail), extend_state(q, joined, *rest, True)
                self.assertLess(error(apart[0], whole[0]), BOUNDS[dtype])
                torch.testing.assert_close(apart[1], whole[1], rtol=1e-3, atol=1e-3)

    def test_parts_merge_to_the_whole(self):
        q, k, v, slots, (qo, kv) = self.inputs(16, 16, 192, 128, torch.bfloat16)
        k, v = k[slots], v[slots]
        wanted = extend_ragged.extend_ragged_torch(q.float(), k.float(), v.float(), qo, kv, 0.07)
        new, prefix, old_lens = [], [], []
        for i, (fresh, total) in enumerate(zip(self.Q_LENS, self.KV_LENS)):
            start = int(kv[i])
            prefix += range(start, start + total - fresh)
            new += range(start + total - fresh, start + total)
            old_lens.append(total - fresh)
        old_bounds = indptr(old_lens).to(DEVICE)
        state = extend_state(q, k[new], v[new], qo, qo, 0.07, True)
        other = extend_state(q, k[prefix], v[prefix], qo, old_bounds, 0.07, False)
        reference = extend_state.reference(q.float(), k[prefix].float(), v[prefix].float(), qo, old_bounds, 0.07, False)
        torch.testing.assert_close(other[1], reference[1], rtol=1e-3, atol=1e-3)
        self.assertLess(error(merge_states(*state, *other)[0], wanted), 1.5e-2)


def make_backend(kind, device, dtype):
    requests = ReqToTokenPool(8, 4096, device)
    pools = kv_pools(8192, 1, dtype, 2, 128, [0], device)
    config = SimpleNamespace(text=None, dtype=dtype)
    return kind(AttentionContext(config, requests, pools, torch.device(device))), requests


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestBackendOnGpu(CustomTestCase):
    """Prefill, a second chunk with single tokens next to it, and decode: the GPU backend against torch's on the CPU."""

    LAYER = SimpleNamespace(num_heads=16, num_kv_heads=2, head_dim=128, v_head_dim=128, scaling=0.09, layer_id=0)

    def test_it_agrees_and_does_not_wait(self):
        ours, our_requests = make_backend(TritonGqaBackend, DEVICE, torch.float32)
        theirs, their_requests = make_backend(TorchNativeGqaBackend, "cpu", torch.float32)
        generator = torch.Generator().manual_seed(0)
        free = (torch.randperm(8000, generator=generator) + 1).tolist()
        rows = [our_requests.alloc() for _ in range(4)]
        self.assertEqual(rows, [their_requests.alloc() for _ in range(4)])
        lens = [0, 0, 0, 0]
        # The first step of a shape compiles, which may wait for the device; steps 2 and 4 may not.
        for step, lengths in enumerate(([900, 40, 1, 3], [1, 200, 1, 1], [1, 300, 1, 2], None, None)):
            decode = lengths is None
            lengths = lengths or [1] * len(rows)
            prefixes, lens = lens, [a + b for a, b in zip(lens, lengths)]
            slots = torch.tensor([free.pop() for _ in range(sum(lengths))])
            for requests in (our_requests, their_requests):
                parts = slots.split(lengths)
                for row, prefix, part in zip(rows, prefixes, parts):
                    requests.write(row, prefix, part)
            if decode:
                batch = ModelWorkerBatch.uniform(DECODE, rows, lens, slots)
            else:
                ids = torch.zeros(sum(lengths), dtype=torch.int64)
                batch = ModelWorkerBatch.extend(rows, prefixes, lens, ids, slots, forward_mode=ForwardMode.MIXED)
            q, gate = torch.randn(sum(lengths), 16, 2, 128, generator=generator).unbind(2)
            k, v = torch.randn(2, sum(lengths), 2, 128, generator=generator)
            outs = []
            for backend, device in ((ours, DEVICE), (theirs, "cpu")):
                forward_batch = ForwardBatch.from_worker_batch(batch, torch.device(device), backend)
                on_device = [tensor.to(device) for tensor in (q, gate, k, v)]
                strict = device != "cpu" and step in (2, 4)
                # On the host the references answer, as they do where there is no GPU.
                host = override_platform(CpuPlatform()) if device == "cpu" else nullcontext()
                torch.cuda.set_sync_debug_mode("error" if strict else "default")
                try:
                    with host, fresh_decisions():
                        backend.init_forward_metadata(forward_batch)
                        backend.store(*on_device[2:], self.LAYER, forward_batch)
                        outs.append(backend.attend(on_device[0], self.LAYER, forward_batch, on_device[1]))
                        for name, record in REGISTRY.records.items():
                            self.assertFalse(record.disabled, name)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            self.assertLess(error(outs[0].cpu(), outs[1]), 2e-6)


if __name__ == "__main__":
    unittest.main()
