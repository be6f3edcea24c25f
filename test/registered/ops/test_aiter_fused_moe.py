"""The experts by AITER over the fake: parity with the torch reference, the weight layout, and what is refused."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.ops.moe.fused_experts import arrange_experts, fused_experts, fused_experts_torch
from sglang.kernels.ops.moe.fused_experts_aiter import is_arranged
from sglang.kernels.ops.moe.fused_experts_fp8 import (
    arrange_experts_fp8,
    fused_experts_fp8,
    fused_experts_fp8_torch,
)
from sglang.kernels.registry import REGISTRY, fresh_decisions
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.fp8 import quantize_blocks, to_fnuz
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

use_fakes()

# Asked of the embedded model, whose tokens are bytes.
QUESTIONS = ("12+30=", "rev:abcd=", "sort:5213=")
EXPERTS, HIDDEN, WIDTH, TOP_K = 6, 256, 128, 3


def routings(generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, rows in (("one row", 1), ("batch", 19), ("none", 0)):
        ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
        yield name, torch.rand(rows, TOP_K, generator=generator), ids
        if rows > 1:
            holes = torch.rand(rows, TOP_K, generator=generator) < 0.4
            yield "holes", torch.rand(rows, TOP_K, generator=generator), ids.masked_fill(holes, -1)
            yield "nobody's", torch.rand(rows, TOP_K, generator=generator), torch.full_like(ids, -1)
            yield "padding", torch.zeros(rows, TOP_K), torch.full_like(ids, 2)


class OverFake(CustomTestCase):
    def setUp(self) -> None:
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(override_platform(RocmOverFakesPlatform(find_fakes())))
        stack.enter_context(envs.SGLANG_USE_AITER.override(True))
        stack.enter_context(fresh_decisions())
        REGISTRY.start_serving()  # a failing kernel raises instead of being replaced
        self.addCleanup(setattr, REGISTRY, "serving", False)
        self.generator = torch.Generator().manual_seed(5)
        self.w13 = self.random(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
        self.w2 = self.random(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def assert_near(self, found: torch.Tensor, wanted: torch.Tensor, bound: float, name: str) -> None:
        self.assertEqual((found.dtype, found.shape), (wanted.dtype, wanted.shape), name)
        if wanted.numel():
            error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6)
            self.assertLessEqual(float(error), bound, name)


class TestParity(OverFake):
    def test_plain_weights(self) -> None:
        for dtype, bound in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
            w13, w2 = self.w13.to(dtype), self.w2.to(dtype)
            arranged = w13.clone(), w2.clone()
            self.assertTrue(arrange_experts(*arranged))
            self.assertFalse(torch.equal(arranged[0], w13), "the layout must move something")
            for name, weights, ids in routings(self.generator):
                x = self.random(ids.shape[0], HIDDEN).to(dtype)
                wanted = fused_experts_torch(x, w13, w2, weights, ids)
                with mock.patch("aiter.fused_moe._check_routing") as reached:
                    found = fused_experts(x, *arranged, weights, ids)
                self.assertEqual(reached.call_count, int(ids.shape[0] > 0), name)
                self.assert_near(found, wanted, bound, f"{dtype} {name}")

    def test_eight_bit_weights(self) -> None:
        stacks = []
        for w in (self.w13, self.w2):
            pairs = [to_fnuz(*quantize_blocks(expert)) for expert in w]
            stacks.append((torch.stack([q for q, _ in pairs]), torch.stack([scale for _, scale in pairs])))
        (w13, w13_scale), (w2, w2_scale) = stacks
        arranged = w13.clone(), w2.clone()
        self.assertTrue(arrange_experts_fp8(*arranged))
        for name, weights, ids in routings(self.generator):
            x = self.random(ids.shape[0], HIDDEN).bfloat16()
            wanted = fused_experts_fp8_torch(x, w13, w13_scale, w2, w2_scale, weights, ids)
            found = fused_experts_fp8(x, arranged[0], w13_scale, arranged[1], w2_scale, weights, ids)
            self.assert_near(found, wanted, 0.03, name)


class TestLayout(OverFake):
    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32)
        return self.random(2, HIDDEN).bfloat16(), torch.rand(2, TOP_K, generator=self.generator), ids

    def test_only_aiter_reads_arranged_weights(self) -> None:
        w13, w2 = self.w13.bfloat16(), self.w2.bfloat16()
        self.assertTrue(arrange_experts(w13, w2))
        self.assertFalse(arrange_experts(w13, w2), "a second time would shuffle the shuffled")
        x, weights, ids = self.routed()
        with self.assertRaisesRegex(ValueError, "SGLANG_USE_AITER=0"):
            fused_experts_torch(x, w13, w2, weights, ids)
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions(), self.assertRaisesRegex(ValueError, "arranged"):
            fused_experts(x, w13, w2, weights, ids)

    def test_weights_stay_unless_aiter_is_chosen(self) -> None:
        def stays(w13: torch.Tensor, w2: torch.Tensor) -> None:
            before = w13.clone()
            self.assertFalse(arrange_experts(w13, w2))
            self.assertFalse(is_arranged(w13))
            self.assertTrue(torch.equal(w13, before))

        stays(self.w13, self.w2)  # float32
        stays(self.w13.bfloat16()[..., :40].contiguous(), self.w2.bfloat16())
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
            stays(self.w13.bfloat16(), self.w2.bfloat16())
        with envs.SGLANG_KERNELS.override("moe.fused_experts=torch"), fresh_decisions():
            stays(self.w13.bfloat16(), self.w2.bfloat16())

    def test_plain_weights_do_not_reach_aiter(self) -> None:
        x, weights, ids = self.routed()
        w13, w2 = self.w13.bfloat16(), self.w2.bfloat16()
        found = fused_experts(x, w13, w2, weights, ids)
        self.assertTrue(torch.equal(found, fused_experts_torch(x, w13, w2, weights, ids)))


class TestServing(OverFake):
    def serve(self) -> tuple[list[list[int]], list[float]]:
        harness = EngineHarness(str(EMBEDDED_MODELS["deepseek-v3-tiny"]), dtype="bfloat16")
        for question in QUESTIONS:
            params = SamplingParams(temperature=0.0, max_new_tokens=8)
            harness.submit(question, list(question.encode()), params, return_logprob=True)
        results = harness.run()
        answers = [results[question].output_ids for question in QUESTIONS]
        return answers, [x for question in QUESTIONS for x in results[question].output_logprobs.logprobs]

    def test_same_tokens_with_and_without(self) -> None:
        with mock.patch("aiter.fused_moe._check_routing") as experts:
            tokens, logprobs = self.serve()
        self.assertGreater(experts.call_count, 6)
        self.assertEqual(REGISTRY.records["sampling.greedy"].calls_refused, {})
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
            plain_tokens, plain = self.serve()
        self.assertEqual(tokens, plain_tokens)
        self.assertLess(max(abs(a - b) for a, b in zip(logprobs, plain, strict=True)), 0.05)


class TestFakeRefuses(OverFake):
    """What AITER would answer with the wrong numbers."""

    def call(self, **changes: object) -> torch.Tensor:
        from aiter.fused_moe import fused_moe
        from aiter.ops.shuffle import shuffle_weight

        w13, w2 = (shuffle_weight(w.bfloat16()) for w in (self.w13, self.w2))
        arguments: dict[str, object] = {
            "hidden_states": self.random(2, HIDDEN).bfloat16(),
            "w1": w13,
            "w2": w2,
            "topk_weight": torch.rand(2, TOP_K),
            "topk_ids": torch.tensor([[0, 2, 6], [1, 3, 6]], dtype=torch.int32),
            "expert_mask": torch.tensor([1] * EXPERTS + [0], dtype=torch.int32),
        }
        return fused_moe(**{**arguments, **changes})

    def test_rows_past_the_count_are_poison(self) -> None:
        out = self.call(num_local_tokens=torch.tensor([1], dtype=torch.int32))
        self.assertTrue(bool(out[0].isfinite().all() and out[1].isnan().all()))

    def test_misuse(self) -> None:
        from aiter import QuantType, VendorWouldCorrupt

        misuses: dict[str, dict[str, object]] = {
            "negative id": {"topk_ids": torch.tensor([[0, 2, -1], [1, 3, 6]], dtype=torch.int32)},
            "id past the mask": {"topk_ids": torch.tensor([[0, 2, 7], [1, 3, 6]], dtype=torch.int32)},
            "last column not masked": {"topk_ids": torch.tensor([[0, 2, 4], [1, 3, 6]], dtype=torch.int32)},
            "expert twice": {"topk_ids": torch.tensor([[2, 2, 6], [1, 3, 6]], dtype=torch.int32)},
            "ids of 64 bits": {"topk_ids": torch.tensor([[0, 2, 6], [1, 3, 6]])},
            "weights not shuffled": {"w1": self.w13.bfloat16()},
            "mask of another size": {"expert_mask": torch.ones(EXPERTS + 1, dtype=torch.int32)},
            "count past the buffer": {"num_local_tokens": torch.tensor([3], dtype=torch.int32)},
            "scales of nothing": {"quant_type": QuantType.per_128x128},
        }
        for name, changes in misuses.items():
            with self.assertRaises(VendorWouldCorrupt, msg=name):
                self.call(**changes)
        with self.assertRaises(AssertionError):
            self.call(dtype=torch.float32)


if __name__ == "__main__":
    unittest.main()
