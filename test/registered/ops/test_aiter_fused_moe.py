"""The experts by AITER over the fake: parity with the torch reference, the weight layout, and what is refused."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.ops.moe.fused_experts import fused_experts, fused_experts_torch, shuffle_experts
from sglang.kernels.ops.moe.fused_experts_aiter import is_shuffled
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.unquant import UnquantizedMethod
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test import aiter_moe_cases
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

use_fakes()

# Prompts for the embedded model, whose tokens are bytes.
QUESTIONS = ("12+30=", "rev:abcd=", "sort:5213=")


class OverFake(aiter_moe_cases.AiterMoeBase, CustomTestCase):
    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        super().setUp()


class TestParityOverFake(OverFake, aiter_moe_cases.AiterMoeCases):
    pass


class TestLayout(OverFake):
    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32)
        return (
            self.random(2, self.hidden).bfloat16(),
            torch.rand(2, aiter_moe_cases.TOP_K, generator=self.generator),
            ids,
        )

    def test_only_aiter_reads_shuffled_weights(self) -> None:
        w13, w2 = self.w13.bfloat16(), self.w2.bfloat16()
        self.assertTrue(shuffle_experts(w13, w2))
        self.assertFalse(shuffle_experts(w13, w2), "a second time would shuffle the shuffled")
        x, weights, ids = self.routed()
        with self.assertRaisesRegex(ValueError, "SGLANG_USE_AITER=0"):
            fused_experts_torch(x, w13, w2, weights, ids)
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions(), self.assertRaisesRegex(ValueError, "shuffled"):
            fused_experts(x, w13, w2, weights, ids)

    def test_weights_stay_unless_aiter_is_chosen(self) -> None:
        def stays(w13: torch.Tensor, w2: torch.Tensor) -> None:
            before = w13.clone()
            self.assertFalse(shuffle_experts(w13, w2))
            self.assertFalse(is_shuffled(w13))
            self.assertTrue(torch.equal(w13, before))

        stays(self.w13, self.w2)  # float32
        stays(self.w13.bfloat16()[..., :40].contiguous(), self.w2.bfloat16())
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
            stays(self.w13.bfloat16(), self.w2.bfloat16())
        with envs.SGLANG_KERNELS.override("moe.fused_experts=torch"), fresh_decisions():
            stays(self.w13.bfloat16(), self.w2.bfloat16())

    def test_clamped_experts_are_not_shuffled(self) -> None:
        """AITER's kernel takes no limit, and no other reads its layout."""
        for limit in (0.5, None):
            w13, w2 = self.w13.bfloat16(), self.w2.bfloat16()
            layer: Any = SimpleNamespace(w13_weight=w13, w2_weight=w2, swiglu_limit=limit)
            method = UnquantizedMethod()
            method.process_weights_after_loading(layer)
            self.assertEqual(is_shuffled(w13), limit is None)
            x, weights, ids = self.routed()
            if limit is not None:
                found = method.apply_moe(layer, x, weights, ids)
                self.assertTrue(torch.equal(found, fused_experts_torch(x, w13, w2, weights, ids, limit)))
                self.assertFalse(torch.equal(found, fused_experts_torch(x, w13, w2, weights, ids)))

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
            "hidden_states": self.random(2, self.hidden).bfloat16(),
            "w1": w13,
            "w2": w2,
            "topk_weight": torch.rand(2, aiter_moe_cases.TOP_K),
            "topk_ids": torch.tensor([[0, 2, 6], [1, 3, 6]], dtype=torch.int32),
            "expert_mask": torch.tensor([1] * aiter_moe_cases.EXPERTS + [0], dtype=torch.int32),
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
            "mask of another size": {"expert_mask": torch.ones(aiter_moe_cases.EXPERTS + 1, dtype=torch.int32)},
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
