"""Every op, every implementation that runs on the local GPU, every case; its CPU sibling is test_op_parity.py."""

import dataclasses
import functools
import itertools
import unittest
from unittest import mock

import torch
from test_op_parity import (
    EIGHT_BIT_ERROR,
    OWN_DTYPES,
    TRUTHS,
    assert_near_by_row,
    check_case,
    clone,
    strided_copy,
    tensors,
    widened,
)

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul_quantized_triton, silu_and_mul_triton
from sglang.kernels.ops.attention.decode_attention import decode_attention_triton
from sglang.kernels.ops.attention.mla_decode_project import mla_decode_project_triton
from sglang.kernels.ops.attention.prepare_mla import prepare_mla_triton
from sglang.kernels.ops.moe.fused_experts import fused_experts, fused_experts_triton, order_pairs
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8_torch, fused_experts_fp8_triton
from sglang.kernels.ops.moe.fused_experts_mxfp4 import (
    PLACED_ARCHS,
    fused_experts_mxfp4_scaled,
    fused_experts_mxfp4_torch,
    fused_experts_mxfp4_triton,
    place_experts,
    random_experts,
    require_true_scaled_product,
)
from sglang.kernels.ops.norm.add_norm_logits import add_norm_logits_triton
from sglang.kernels.ops.norm.fused_add_rmsnorm import fused_add_rms_norm_triton
from sglang.kernels.ops.norm.norm_product import norm_product_apart, norm_product_row
from sglang.kernels.ops.norm.rmsnorm import rms_norm_triton
from sglang.kernels.ops.norm.rmsnorm_quantized import rms_norm_quantized_triton
from sglang.kernels.ops.quant.group_fp8 import block_fp8_linear_torch, quantize_groups_triton
from sglang.kernels.registry import REGISTRY
from sglang.srt.platforms import current_platform
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.op_cases import Case, cases_of
from sglang.test.op_cases.quant import random_blocks
from sglang.test.test_utils import CustomTestCase

register_cuda_ci(est_time=240, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=400, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=400, suite="stage-b-test-1-gpu-small-amd-mi35x")

DEVICE = "cuda"
ATTENTION = ("attention", "attention_state", "kv_cache")
EXTREME = ("saturated", "huge", "nan-row", "cancelling")


def to(args, device):
    return tuple(strided_copy(arg, device) if isinstance(arg, torch.Tensor) else arg for arg in args)


def on_device(impl):
    """Run the implementation on the GPU and copy its results back, also what it writes into its arguments."""

    def run(*args):
        moved = to(args, DEVICE)
        out = impl.fn(*moved)
        for arg, after in zip(args, moved, strict=True):
            if isinstance(arg, torch.Tensor):
                arg.copy_(after.cpu())
        if isinstance(out, torch.Tensor):
            return out.cpu()
        return tuple(part.cpu() if isinstance(part, torch.Tensor) else part for part in out)

    return dataclasses.replace(impl, fn=run)


def half(name, case, dtype):
    """The case with its floats in ``dtype``, except what the contract keeps in float32 (tables, routing weights)."""
    kept = {"rope.rotary": (3,), "moe.fused_experts": (3,)}.get(name, ())
    return [
        arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() and i not in kept else arg
        for i, arg in enumerate(case.args)
    ]


def moe_case(tokens, experts, hidden, width, top_k, dtype, skewed=False):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    w13 = torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, width, generator=generator) / width**0.5
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator)
    if skewed:
        ids[:, : experts // 2] = 0.0
    ids = ids.topk(top_k, dim=-1).indices.int()
    ids[torch.rand(tokens, top_k, generator=generator) < 0.1] = -1
    args = [x.to(dtype), w13.to(dtype), w2.to(dtype), weights, ids]
    return Case(f"{tokens}x{experts}x{hidden}x{width}", tuple(args))


def eight_bit_case(tokens, hidden):
    """Arguments of 8-bit experts, 4 of width 1,024 and 2 per token, up to the ids; a tenth of the pairs is nobody's."""
    generator = torch.Generator().manual_seed(tokens)
    stacked = (
        torch.stack(part)
        for rows, columns in ((2048, hidden), (hidden, 1024))
        for part in zip(*(random_blocks(rows, columns, generator) for _ in range(4)), strict=True)
    )
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weights = torch.rand(tokens, 2, generator=generator)
    ids = torch.rand(tokens, 4, generator=generator).topk(2, dim=-1).indices.int()
    ids[torch.rand(tokens, 2, generator=generator) < 0.1] = -1
    return (x, *stacked, weights, ids)


@functools.cache
def four_bit_forms(dtype):
    """The forms of the four-bit experts that a server on this GPU may choose, and the one that its check allows."""
    forms = [fused_experts_mxfp4_triton]
    if dtype == torch.bfloat16:
        try:
            require_true_scaled_product(torch.device(DEVICE))
            forms.append(fused_experts_mxfp4_scaled)
        except RuntimeError as error:
            print(error)
    return forms


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestTritonOpsOnGpu(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.backends.cuda.matmul.allow_tf32 = False
        with fresh_decisions():
            REGISTRY.freeze()
            cls.runnable = {
                op.name: [impl for impl in op.impls if REGISTRY.records[op.name].verdicts[impl.name] == "ok"]
                for op in REGISTRY.ops.values()
            }

    def _walk(self, *groups):
        """Every runnable implementation of the ops of these groups on every case."""
        count = 0
        for name, impls in sorted(self.runnable.items()):
            op = REGISTRY.ops[name]
            for impl in impls if op.group in groups else ():
                for case in cases_of(op):
                    if impl.accepts is None or impl.accepts(*to(case.args, DEVICE)):
                        with self.subTest(op=name, impl=impl.name, case=case.name):
                            check_case(op, on_device(impl), case, on_matrix_units=True)
                            count += 1
        self.assertGreater(count, 0)
        print(f"{groups}: {count} (op, implementation, case) triples on {torch.cuda.get_device_name()}")

    def test_attention(self):
        self._walk(*ATTENTION)

    def test_gated_delta_net(self):
        self._walk("gdn")

    def test_experts_and_routers(self):
        self._walk("moe", "quant")

    def test_eight_bit_experts_at_each_tile_of_many_tokens(self):
        """20, 150 and 300 rows per expert; hidden 384 is one run of columns too many for a tile of two, and for sm_90's
        kernel of over 24 rows.

        With 1,024 activated numbers per row none weighs so much that one rounded to its other neighbour shows.
        """
        for tokens, hidden in itertools.product((40, 300, 600), (384, 512)):
            case = eight_bit_case(tokens, hidden)
            for limit in (None, 0.5):
                args = (*case, None, None, limit)
                with self.subTest(tokens=tokens, hidden=hidden, limit=limit):
                    found = fused_experts_fp8_triton(*to(args, DEVICE))
                    wanted = fused_experts_fp8_torch(*args)
                    assert_near_by_row(found.cpu(), wanted, EIGHT_BIT_ERROR["moe.fused_experts_fp8"] + 2e-3)

    def test_eight_bit_experts_in_a_graph_on_two_streams_and_of_nobody(self):
        cases = [to(eight_bit_case(tokens, 512), DEVICE) for tokens in (600, 900)]
        (impl,) = (impl for impl in self.runnable["moe.fused_experts_fp8"] if impl.name == "triton")
        self._replay(impl, cases[0])
        wanted = [impl.fn(*case) for case in cases]
        found = []
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        for stream, case in [*zip(streams, cases, strict=True)] * 10:
            with torch.cuda.stream(stream):
                found.append(impl.fn(*case))
        torch.cuda.synchronize()
        for number, result in enumerate(found):
            self.assertTrue(torch.equal(result, wanted[number % 2]))
        of_nobody = impl.fn(*cases[0][:-1], torch.full_like(cases[0][-1], -1))
        self.assertTrue(torch.equal(of_nobody, torch.zeros_like(of_nobody)))

    def test_sixteen_bit_experts_of_specialised_warps_are_those_of_triton_s_tiles(self):
        """Bit for bit, with pairs of nobody; twice, as programs draw their tiles."""
        for tokens, limit in itertools.product((40, 300, 1111), (None, 0.5)):
            args = (*to(moe_case(tokens, 4, 512, 384, 2, torch.bfloat16).args, DEVICE), limit)
            found = [fused_experts_triton(*args) for _ in range(2)]
            with mock.patch("sglang.kernels.ops.moe.fused_experts.fits_slots", lambda *_: False):
                wanted = fused_experts_triton(*args)
            with self.subTest(tokens=tokens, limit=limit):
                self.assertTrue(all(torch.equal(one, wanted) for one in found))

    def test_eight_bit_product_of_the_library(self):
        generator = torch.Generator().manual_seed(4)
        w, scale = random_blocks(272, 512, generator)
        impls = [impl for impl in self.runnable["quant.block_fp8_linear"] if impl.name != "torch"]
        for rows, impl in itertools.product((1, 17, 32, 100, 1000), impls):
            x = torch.randn(rows, 512, generator=generator).bfloat16()
            args = to((x, w, scale), DEVICE)
            if impl.accepts(*args):
                with self.subTest(rows=rows, impl=impl.name):
                    wanted = block_fp8_linear_torch(x.float(), w, scale)
                    # Half a unit of the result's bfloat16 on top.
                    assert_near_by_row(impl.fn(*args), wanted, EIGHT_BIT_ERROR["quant.block_fp8_linear"] + 2e-3)
                    q, scales = quantize_groups_triton(args[0], args[1].dtype, for_product=True)
                    given = (q, *args[1:], scales, torch.bfloat16)
                    self.assertTrue(impl.accepts(*given))
                    self.assertTrue(torch.equal(impl.fn(*given), impl.fn(*args)))

    def test_rows_are_quantised_as_by_an_op_of_their_own(self):
        """Bit for bit, rows in bfloat16 at widths of served models, in both layouts of the scales."""
        generator = torch.Generator().manual_seed(6)
        fp8 = torch.float8_e4m3fn
        for rows, width in itertools.product((1, 16, 17, 100), (1536, 7168)):
            x, residual = (torch.randn(rows, width, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
            gain = torch.rand(width, generator=generator).bfloat16().to(DEVICE)
            with self.subTest(rows=rows, width=width):
                found = rms_norm_quantized_triton(x, residual, gain, 1e-6, fp8)
                normed, total = fused_add_rms_norm_triton(x, residual, gain, 1e-6)
                wanted = normed, *quantize_groups_triton(normed, fp8), total
                found += rms_norm_quantized_triton(x, None, gain, 1e-6, fp8)[:3]
                normed = rms_norm_triton(x, gain, 1e-6)
                wanted += normed, *quantize_groups_triton(normed, fp8)
                found += silu_and_mul_quantized_triton(x, fp8)
                wanted += quantize_groups_triton(silu_and_mul_triton(x), fp8)
                for part, apart in zip(found, wanted, strict=True):
                    self.assertTrue(torch.equal(part.float(), apart.float()))

    def test_logits_of_few_rows_come_with_their_norm(self):
        """Rows equal those of separate ops bit for bit, logits are near the reference, at widths of served models."""
        generator = torch.Generator().manual_seed(8)
        shapes = ((1, 2048, 64, False, None), (4, 2048, 264, True, None), (1, 7168, 256, False, torch.float8_e4m3fn))
        for rows, width, experts, gemma, fp8 in shapes:
            sizes = ((rows, width), (rows, width), (width,), (experts, width))
            x, residual, gain, gate = (torch.randn(size, generator=generator).bfloat16().to(DEVICE) for size in sizes)
            gate = gate / width**0.5
            with self.subTest(width=width, experts=experts):
                normed, total = fused_add_rms_norm_triton(x, residual, gain, 1e-6, gemma)
                made = () if fp8 is None else quantize_groups_triton(normed, fp8)
                found = add_norm_logits_triton(x, residual, gain, 1e-6, gate, torch.float32, gemma, fp8)
                for part, apart in zip((*found[:2], *found[3:]), (normed, total, *made), strict=True):
                    self.assertTrue(torch.equal(part.float(), apart.float()))
                torch.testing.assert_close(found[2], normed.float() @ gate.float().t(), rtol=1e-3, atol=1e-3)

    def test_one_row_is_normed_by_who_multiplies_it(self):
        """Rows are those of separate ops, to one rounding of the sum of squares, and products near float64's."""
        generator = torch.Generator().manual_seed(10)
        for dim, width, gemma, added in (
            (2048, 3648, False, True), (2048, 12352, True, True), (2048, 4097, True, False),
            (1536, 24576, False, False), (128, 5, False, True),
        ):  # fmt: skip
            sizes = ((1, dim), (1, dim), (dim,), (width, dim))
            x, residual, gain, w = (torch.randn(size, generator=generator).bfloat16().to(DEVICE) for size in sizes)
            args = (x, residual if added else None, gain, 1e-6, w / dim**0.5, gemma)
            with self.subTest(dim=dim, width=width):
                product, normed, total = norm_product_row(*args)
                apart = norm_product_apart(*args)
                self.assertTrue(torch.equal(total, apart[2]))
                torch.testing.assert_close(normed, apart[1], rtol=2**-7, atol=0)
                self.assertLess((normed != apart[1]).float().mean().item(), 0.01)
                wanted = normed.double() @ args[4].double().t()
                torch.testing.assert_close(product.double(), wanted, rtol=2**-8, atol=2e-3)

    def test_latent_attention_takes_its_inner_products_along(self):
        """One request and few, 16 and 128 heads, contexts short and long, against separate ops."""
        generator = torch.Generator().manual_seed(9)
        for heads, batch, length, fp8 in itertools.product((16, 128), (1, 3), (40, 1500), (None, torch.float8_e4m3fn)):
            q, cache = torch.randn(batch, heads, 576, generator=generator), torch.randn(4096, 576, generator=generator)
            w = torch.randn(heads, 256, 512, generator=generator) / 512**0.5
            table = torch.stack([torch.randperm(4096, generator=generator) for _ in range(batch)]).int()
            lens = torch.tensor([length, 7, 1300][:batch])
            q, cache, w = (tensor.bfloat16().to(DEVICE) for tensor in (q, cache, w))
            rows = to((table, torch.arange(batch), lens), DEVICE)
            with self.subTest(heads=heads, batch=batch, length=length, fp8=fp8):
                w_vc = w[:, 128:].transpose(1, 2)
                out = mla_decode_project_triton(q, cache, *rows, w_vc, 0.07, fp8)
                if fp8 is not None:
                    out = out[0].float() * out[1].repeat_interleave(128, 1)
                context = decode_attention_triton(q, cache.unsqueeze(1), None, *rows, 0.07, 512)
                wanted = torch.einsum("bhr,hrv->bhv", context.float(), w_vc.float()).flatten(1)
                assert_near_by_row(out, wanted, 5e-3 if fp8 is None else 5e-2)
                queries = torch.zeros_like(q)
                absorbed = torch.einsum("bhd,hdr->bhr", q[..., :128].float(), w[:, :128].float())
                args = (cache[:batch], rows[1], torch.ones(4096, 64, device=DEVICE), w[0, 0], cache, rows[1], 1e-6)
                prepare_mla_triton(q[..., :192], *args, False, queries, w[:, :128])
                assert_near_by_row(queries[..., :512].flatten(1), absorbed.flatten(1), 5e-3)

    def test_everything_else(self):
        self._walk(*({op.group for op in REGISTRY.ops.values()} - {*ATTENTION, "gdn", "moe", "quant"}))

    def test_bfloat16_stays_near_the_truth(self):
        count = 0
        for name, truth in TRUTHS.items():
            for impl in self.runnable[name] if name not in OWN_DTYPES else ():
                for case in cases_of(REGISTRY.ops[name]):
                    args = half(name, case, torch.bfloat16)
                    if case.name in EXTREME or (impl.accepts and not impl.accepts(*to(args, DEVICE))):
                        continue
                    with self.subTest(op=name, impl=impl.name, case=case.name):
                        out = tensors(on_device(impl).fn(*clone(args)))
                        for found, wanted in zip(out, tensors(truth(*args)), strict=True):
                            self.assertEqual(found.dtype, torch.bfloat16)
                            torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=3e-2, equal_nan=True)
                        count += 1
        print(f"{count} bfloat16 triples")

    def test_experts_at_serving_widths(self):
        triton = next(impl for impl in fused_experts.impls if impl.name == "triton")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for tokens in (1, 2, 16, 17, 130, 700):
                for skewed in (False, True):
                    case = moe_case(tokens, 16, 512, 352, 4, dtype, skewed)
                    args = to(case.args, DEVICE)
                    wide = [arg.float() if arg.dtype == dtype else arg for arg in args]
                    with self.subTest(dtype=dtype, tokens=tokens, skewed=skewed):
                        wanted = fused_experts.reference(*wide)
                        error = (triton.fn(*args).float() - wanted).abs().max() / wanted.abs().max()
                        self.assertLess(float(error), 2e-5 if dtype == torch.float32 else 1e-2)

    def test_four_bit_experts_at_serving_widths(self):
        """Codes as numbers in registers, and as ``tl.dot_scaled`` takes them where that has been proven."""
        generator = torch.Generator().manual_seed(9)
        stacked = to((*random_experts(16, 704, 512, generator), *random_experts(16, 512, 352, generator)), DEVICE)
        for tokens, limit in itertools.product((1, 2, 16, 17, 130, 700), (None, 0.5)):
            ids = torch.rand(tokens, 16, generator=generator).topk(4).indices.to(DEVICE, torch.int32)
            ids = ids.masked_fill(torch.rand(tokens, 4, generator=generator).to(DEVICE) < 0.2, -1)
            weights = torch.rand(tokens, 4, generator=generator).to(DEVICE)
            x = torch.randn(tokens, 512, generator=generator).to(DEVICE)
            for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 2e-5)):
                rows = x.to(dtype)
                wanted = fused_experts_mxfp4_torch(rows.float(), *stacked, weights, ids, limit)
                for run in four_bit_forms(dtype):
                    with self.subTest(dtype=dtype, tokens=tokens, limit=limit, run=run.__name__):
                        found = run(rows, *stacked, weights, ids, limit)
                        error = (found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
                        self.assertLess(float(error), bound)

    @unittest.skipUnless(current_platform.arch in PLACED_ARCHS, "instructions of sm_90")
    def test_placed_four_bit_experts(self):
        """Each path, ragged columns of a tile, experts that nobody chose, more pairs of one than a block has."""
        generator = torch.Generator().manual_seed(11)
        for hidden, width in ((256, 128), (384, 192), (512, 640)):
            stacks = [*random_experts(16, 2 * width, hidden, generator), *random_experts(16, hidden, width, generator)]
            width_placed = width % 128 == 0
            for tokens, limit in ((1, None), (8, 0.5), (16, None), (21, 0.5), (300, None)):
                ids = torch.randint(0, 15, (tokens, 3), generator=generator, dtype=torch.int32)
                ids[torch.rand(tokens, 3, generator=generator) < 0.2] = -1
                ids[:, 0] = 14
                x, weights = (
                    torch.randn(tokens, hidden, generator=generator),
                    torch.rand(tokens, 3, generator=generator),
                )
                x, weights, ids = x.bfloat16().to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)
                moved = [one.to(DEVICE) for one in stacks]
                wanted = fused_experts_mxfp4_torch(x.float(), *moved, weights, ids, limit)
                self.assertEqual(place_experts(*moved), width_placed)
                with self.subTest(hidden=hidden, width=width, tokens=tokens):
                    found = fused_experts_mxfp4_triton(x, *moved, weights, ids, limit)
                    error = (found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
                    self.assertLess(float(error), 1e-2)

    def test_four_bit_experts_at_the_ends_of_the_scales(self):
        generator = torch.Generator().manual_seed(10)
        codes = [
            torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in ((1, 64, 32), (1, 64, 16))
        ]
        ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
        # Below byte 3 the scaled product takes 3: off by 2^-124 times the row, far below what is asked here.
        for byte, size in ((0, 1.0), (1, 1.0), (127, 1.0), (254, 2.0**-60)):
            scales = torch.full((1, 64, 2), 127, dtype=torch.uint8), torch.full((1, 64, 1), byte, dtype=torch.uint8)
            x = (torch.randn(2, 64, generator=generator) * size).bfloat16()
            args = (codes[0], scales[0], codes[1], scales[1], weights, ids)
            wanted = fused_experts_mxfp4_torch(x.float(), *args)
            for run in four_bit_forms(x.dtype):
                with self.subTest(byte=byte, run=run.__name__):
                    found = run(*to((x, *args), DEVICE)).float().cpu()
                    self.assertTrue(bool(found.isfinite().all()))
                    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-25)
                    self.assertLess(float(error), 1e-2)

    def test_order_is_stable_and_complete(self):
        for tokens, experts, block in ((1, 4, 16), (700, 16, 64), (3000, 100, 16)):
            ids = moe_case(tokens, experts, 8, 8, 3, torch.float32).args[4].to(DEVICE)
            order = order_pairs(ids, experts, block)
            used, counter = order.num_blocks.tolist()
            self.assertEqual(counter, 0)
            flat, wanted = ids.flatten().tolist(), []
            owners = []
            for expert in range(experts):
                mine = [pair for pair, chosen in enumerate(flat) if chosen == expert]
                mine += [len(flat)] * (-len(mine) % block)
                wanted += mine
                owners += [expert] * (len(mine) // block)
            self.assertLessEqual(used, order.max_blocks)
            self.assertEqual(order.block_experts[:used].tolist(), owners)
            self.assertEqual(order.pairs[: used * block].tolist(), wanted)

    def _replay_all(self, *groups):
        for name, impls in sorted(self.runnable.items()):
            op = REGISTRY.ops[name]
            for impl in (impl for impl in impls if impl.name == "triton" and op.group in groups):
                for case in cases_of(op):
                    args = to(case.args, DEVICE)
                    if "empty" in case.name or (impl.accepts is not None and not impl.accepts(*args)):
                        continue
                    with self.subTest(op=name, case=case.name):
                        self._replay(impl, args)

    def test_replay_equals_eager_without_a_sync_attention(self):
        self._replay_all(*ATTENTION)

    def test_replay_equals_eager_without_a_sync(self):
        self._replay_all(*({op.group for op in REGISTRY.ops.values()} - set(ATTENTION)))

    def _replay(self, impl, args):
        eager_args, graph_args = clone(args), clone(args)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            impl.fn(*clone(args))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                eager = tensors(impl.fn(*eager_args))
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    replayed = tensors(impl.fn(*graph_args))
                graph.replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        for found, wanted in zip((*replayed, *graph_args), (*eager, *eager_args), strict=True):
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(widened(found), widened(wanted), rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    unittest.main()
