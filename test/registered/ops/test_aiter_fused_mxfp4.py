"""MXFP4 experts by AITER over the fake: parity, layouts of codes and scales, and where AITER is not asked."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any

import torch

from sglang.kernels.ops.moe.fused_experts_aiter import is_shuffled
from sglang.kernels.ops.moe.fused_experts_mxfp4 import (
    fused_experts_mxfp4,
    fused_experts_mxfp4_torch,
    shuffle_experts_mxfp4,
)
from sglang.kernels.registry import REGISTRY, KernelConfigError
from sglang.srt.configs.quantization import MXFP4, QUARK_MXFP4
from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Method
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test import aiter_moe_cases
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

use_fakes()

from aiter import fake_version  # noqa: E402


class OverFake(aiter_moe_cases.AiterMoeBase, CustomTestCase):
    arch = "gfx950"

    def setUp(self) -> None:
        for context in (override_platform(RocmOverFakesPlatform(find_fakes(), self.arch)), fake_version("0.1.11")):
            self.enterContext(context)
        super().setUp()


class TestParityOverFake(OverFake, aiter_moe_cases.AiterFourBitCases):
    def verdict(self) -> str:
        with fresh_decisions():
            REGISTRY.chosen(fused_experts_mxfp4)
            return REGISTRY.records["moe.fused_experts_mxfp4"].verdicts["aiter"]

    def layer(self, **changes: Any) -> Any:
        names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
        return SimpleNamespace(**dict(zip(names, self.four_bit(), strict=True)), **{"swiglu_limit": None, **changes})

    def test_old_releases_and_other_machines_are_refused_by_name(self) -> None:
        self.assertEqual(self.verdict(), "ok")
        for version in ("0.1.10", "0.1.7.post2.dev18", "0.1.11rc1"):
            with fake_version(version):
                self.assertEqual(self.verdict(), f"package aiter is {version}, this needs 0.1.11")
        with override_platform(RocmOverFakesPlatform(find_fakes(), "gfx942")):
            self.assertEqual(self.verdict(), "not for gfx942 (only gfx950)")
            for forced in ("aiter", "triton_scaled"):
                with envs.SGLANG_KERNELS.override(f"moe.fused_experts_mxfp4={forced}"), fresh_decisions():
                    with self.assertRaisesRegex(
                        KernelConfigError, f"={forced}, which cannot run: not for gfx942 .* one of: torch"
                    ):
                        REGISTRY.freeze()

    def test_only_checkpoints_made_for_four_bit_rows_are_shuffled(self) -> None:
        from dataclasses import replace

        w4a4 = replace(QUARK_MXFP4, four_bit_rows=True)
        for known, limit, shuffled in ((w4a4, None, True), (w4a4, 10.0, False), (QUARK_MXFP4, None, False),
                                       (MXFP4, None, False)):  # fmt: skip
            layer = self.layer(swiglu_limit=limit)
            before = layer.w13_weight.clone()
            method = Mxfp4Method(known)
            method.process_weights_after_loading(layer)
            self.assertEqual(is_shuffled(layer.w13_weight), shuffled)
            self.assertEqual(torch.equal(layer.w13_weight, before), not shuffled)
            x = self.random(3, aiter_moe_cases.FOUR_BIT[1]).bfloat16()
            ids = torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int32)
            self.assertTrue(bool(method.apply_moe(layer, x, torch.ones(3, 2), ids).isfinite().all()))

    def test_parts_of_tiles_stay_as_they_are(self) -> None:
        stacked = self.four_bit()
        cut = [part[:, :, : part.shape[2] // 2].contiguous() for part in stacked]
        self.assertFalse(shuffle_experts_mxfp4(*cut))
        self.assertFalse(is_shuffled(cut[0]))

    def test_only_aiter_reads_shuffled_weights(self) -> None:
        stacked = self.four_bit()
        self.assertTrue(shuffle_experts_mxfp4(*stacked))
        self.assertFalse(shuffle_experts_mxfp4(*stacked), "a second time would shuffle the shuffled")
        x, ids = self.random(1, aiter_moe_cases.FOUR_BIT[1]).bfloat16(), torch.tensor([[0, 1]], dtype=torch.int32)
        with self.assertRaisesRegex(ValueError, "SGLANG_USE_AITER=0"):
            fused_experts_mxfp4_torch(x, *stacked, torch.ones(1, 2), ids)

    def test_the_fake_refuses_what_the_kernels_would_misread(self) -> None:
        from aiter import ActivationType, QuantType, VendorWouldCorrupt
        from aiter.fused_moe import fused_moe

        w13, w13_scale, w2, w2_scale = self.four_bit()
        self.assertTrue(shuffle_experts_mxfp4(w13, w13_scale, w2, w2_scale))

        def call(**changes: Any) -> torch.Tensor:
            pairs: list[Any] = [w.view(torch.float4_e2m1fn_x2) for w in (w13, w2)]
            for each in pairs:
                each.is_shuffled = True
            given = {
                "w1": pairs[0], "w2": pairs[1], "topk_weight": torch.ones(1, 2),
                "topk_ids": torch.tensor([[0, 1]], dtype=torch.int32), "activation": ActivationType.Silu,
                "quant_type": QuantType.per_1x32, "w1_scale": w13_scale.view(torch.float8_e8m0fnu),
                "w2_scale": w2_scale.view(torch.float8_e8m0fnu),
            }  # fmt: skip
            return fused_moe(self.random(1, aiter_moe_cases.FOUR_BIT[1]).bfloat16(), **{**given, **changes})

        self.assertTrue(bool(call().isfinite().all()))
        for changes in ({"w1": w13.view(torch.float4_e2m1fn_x2)}, {"w1_scale": w13_scale},
                        {"w1_scale": None}, {"quant_type": QuantType.per_128x128}):  # fmt: skip
            with self.assertRaises(VendorWouldCorrupt):
                call(**changes)


if __name__ == "__main__":
    unittest.main()
