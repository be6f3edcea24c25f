"""Expected results of AITER's experts, on a device or with the fake."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from sglang.kernels.ops.moe.fused_experts import fused_experts, fused_experts_torch, shuffle_experts
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8, fused_experts_fp8_torch, shuffle_experts_fp8
from sglang.kernels.ops.moe.fused_experts_mxfp4 import fused_experts_mxfp4, shuffle_experts_mxfp4
from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.kernels.ops.quant.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.fp8 import quantize_blocks, to_fnuz
from sglang.srt.platforms import current_platform
from sglang.test.kernel_choice import fresh_decisions

# Experts of which scales in MXFP4 are whole tiles of AITER's.
FOUR_BIT = (4, 256, 256)
EXPERTS, TOP_K = 6, 3


def routings(generator: torch.Generator, device: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, weights [N, k] and ids [N, k]: distinct experts, with and without holes, and rows of padding."""
    for name, rows in (("one row", 1), ("batch", 19), ("none", 0)):
        ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices.to(device, torch.int32)
        weights = torch.rand(rows, TOP_K, generator=generator).to(device)
        yield name, weights, ids
        if rows > 1:
            # A shared expert's slot, the last of the weights, in the last column of every row.
            slotted = torch.rand(rows, EXPERTS - 1, generator=generator).topk(TOP_K - 1).indices.to(device, torch.int32)
            yield "shared last", weights, torch.nn.functional.pad(slotted, (0, 1), value=EXPERTS - 1)
            holes = torch.rand(rows, TOP_K, generator=generator).to(device) < 0.4
            yield "holes", weights, ids.masked_fill(holes, -1)
            yield "nobody's", weights, torch.full_like(ids, -1)
            yield "padding", torch.zeros_like(weights), torch.full_like(ids, 2)


class AiterMoeBase(unittest.TestCase):
    """Random experts, with AITER enabled; subclasses say where and how large."""

    device = "cpu"
    hidden, width = 256, 128

    def setUp(self) -> None:
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(envs.SGLANG_USE_AITER.override(True))
        stack.enter_context(fresh_decisions())
        REGISTRY.start_serving()  # a failing kernel raises instead of being replaced
        self.addCleanup(setattr, REGISTRY, "serving", False)
        self.generator = torch.Generator().manual_seed(5)
        self.w13 = self.random(EXPERTS, 2 * self.width, self.hidden) / self.hidden**0.5
        self.w2 = self.random(EXPERTS, self.hidden, self.width) / self.width**0.5

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)


class AiterMoeCases(AiterMoeBase):
    """Parity with the torch references, which multiply the same numbers in the same formats."""

    def check(self, found: torch.Tensor, wanted: torch.Tensor, bound: float, name: str) -> None:
        self.assertEqual((found.dtype, found.shape), (wanted.dtype, wanted.shape), name)
        if wanted.numel():
            error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6)
            self.assertLessEqual(float(error), bound, name)

    def test_plain_weights(self) -> None:
        for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
            w13, w2 = self.w13.to(dtype), self.w2.to(dtype)
            shuffled = w13.clone(), w2.clone()
            self.assertTrue(shuffle_experts(*shuffled))
            self.assertFalse(torch.equal(shuffled[0], w13), "the layout must move something")
            for name, weights, ids in routings(self.generator, self.device):
                x = self.random(ids.shape[0], self.hidden).to(dtype)
                wanted = fused_experts_torch(x, w13, w2, weights, ids)
                self.check(fused_experts(x, *shuffled, weights, ids), wanted, bound, f"{dtype} {name}")
        self.assertEqual(REGISTRY.records["moe.fused_experts"].calls_refused, {})

    def test_eight_bit_weights(self) -> None:
        stacks = []
        for w in (self.w13, self.w2):
            pairs = [quantize_blocks(expert) for expert in w]
            if fp8_dtype(current_platform.arch) == torch.float8_e4m3fnuz:
                pairs = [to_fnuz(*pair) for pair in pairs]
            stacks.append((torch.stack([q for q, _ in pairs]), torch.stack([scale for _, scale in pairs])))
        (w13, w13_scale), (w2, w2_scale) = stacks
        shuffled = w13.clone(), w2.clone()
        self.assertTrue(shuffle_experts_fp8(*shuffled))
        for name, weights, ids in routings(self.generator, self.device):
            x = self.random(ids.shape[0], self.hidden).bfloat16()
            wanted = fused_experts_fp8_torch(x, w13, w13_scale, w2, w2_scale, weights, ids)
            found = fused_experts_fp8(x, shuffled[0], w13_scale, shuffled[1], w2_scale, weights, ids)
            self.check(found, wanted, 0.04, name)
        self.assertEqual(REGISTRY.records["moe.fused_experts_fp8"].calls_refused, {})


def rounded_to_mxfp4(x: torch.Tensor) -> torch.Tensor:
    return dequantize_mxfp4(*quantize_mxfp4(x))


def experts_of_rounded_rows(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The sum over a token's experts in float32, rows rounded to MXFP4 before both products; w13, w2 plain numbers."""
    out = torch.zeros(x.shape, device=x.device)
    for token in range(x.shape[0]):
        row = rounded_to_mxfp4(x[token : token + 1].float())
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if expert >= 0:
                gate, up = (row @ w13[expert].t()).chunk(2, dim=-1)
                hidden = rounded_to_mxfp4(torch.nn.functional.silu(gate) * up)
                out[token] += weight * (hidden @ w2[expert].t())[0]
    return out.to(x.dtype)


class AiterFourBitCases(AiterMoeBase):
    """MXFP4 weights, and rows that AITER rounds to MXFP4, against the same numbers in float32."""

    def four_bit(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        experts, hidden, width = FOUR_BIT
        w13, w2 = self.random(experts, 2 * width, hidden), self.random(experts, hidden, width)
        return *quantize_mxfp4(w13 / hidden**0.5), *quantize_mxfp4(w2 / width**0.5)

    def test_four_bit_weights(self) -> None:
        stacked = self.four_bit()
        plain = dequantize_mxfp4(*stacked[:2]), dequantize_mxfp4(*stacked[2:])
        shuffled = tuple(part.clone() for part in stacked)
        self.assertTrue(shuffle_experts_mxfp4(*shuffled))
        for before, after in zip(stacked, shuffled, strict=True):
            self.assertFalse(torch.equal(before, after), "the layout must move something")
        for rows in (1, 19, 0):
            ids = torch.rand(rows, FOUR_BIT[0], generator=self.generator).topk(2).indices.to(self.device, torch.int32)
            weights = torch.rand(rows, 2, generator=self.generator).to(self.device)
            holes = torch.rand(rows, 2, generator=self.generator).to(self.device) < 0.4
            for chosen in (ids, ids.masked_fill(holes, -1)):
                x = self.random(rows, FOUR_BIT[1]).bfloat16()
                wanted = experts_of_rounded_rows(x, *plain, weights, chosen)
                found = fused_experts_mxfp4(x, *shuffled, weights, chosen)
                self.assertEqual((found.dtype, found.shape), (wanted.dtype, wanted.shape))
                if rows:
                    error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-6)
                    # Rounding once more in between moves a few numbers by a step.
                    self.assertLess(float(error), 0.03)
        self.assertEqual(REGISTRY.records["moe.fused_experts_mxfp4"].calls_refused, {})
