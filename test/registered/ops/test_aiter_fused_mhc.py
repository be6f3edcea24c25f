"""From sub-block to sub-block by AITER over the fake: parity, what is refused, and graphs over poisoned scratch."""

from __future__ import annotations

import sys
import unittest
from typing import Any
from unittest import mock

import torch

from sglang.kernels import registry
from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre
from sglang.kernels.ops.mhc.hc_post_pre_aiter import mhc_config, partial_sums
from sglang.kernels.registry import REGISTRY
from sglang.srt.models.deepseek_common.amd import deepseek_v4_fused_mhc as fused
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test import aiter_mhc_cases
from sglang.test.aiter_mhc_cases import aiter_asked_for, crossing
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

use_fakes()


class OverFake(CustomTestCase):
    version, arch = "0.1.14", "gfx950"

    def setUp(self) -> None:
        import aiter

        self.platform = RocmOverFakesPlatform(find_fakes(), self.arch)
        for context in (override_platform(self.platform), aiter.fake_version(self.version)):
            self.enterContext(context)
        super().setUp()

    def verdicts(self) -> dict[str, str]:
        with aiter_asked_for():
            REGISTRY.chosen(hc_post_pre)
            return REGISTRY.records[hc_post_pre.name].verdicts


class TestOverFake(OverFake, aiter_mhc_cases.AiterMhcCases):
    pass


class TestReleases(OverFake):
    def test_only_releases_without_the_race(self) -> None:
        import aiter

        for version, runs in (
            ("0.1.7", False), ("0.1.13.post2", False), ("0.1.14.dev7+g1a2b3c", False), ("0.1.14rc1", False),
            ("0.1.14", True), ("0.1.14.post1", True), ("0.1.15.dev1", True), ("0.2", True), ("v1.0.0", True),
            ("", False),
        ):  # fmt: skip
            with self.subTest(version=version), aiter.fake_version(version):
                verdicts = self.verdicts()
                for name in ("aiter", "aiter_triton"):
                    self.assertEqual(verdicts[name] == "ok", runs)
                    if not runs:
                        self.assertIn(f"{version or 'of unknown version'}, this needs 0.1.14", verdicts[name])

    def test_other_architecture(self) -> None:
        with override_platform(RocmOverFakesPlatform(find_fakes(), "gfx942")):
            self.assertIn("not for gfx942", self.verdicts()["aiter"])

    def test_an_import_that_failed_is_remembered(self) -> None:
        """As one that worked: one attempt and one line over ten thousand calls."""
        args = crossing(1, 64, "cpu")
        attempts = mock.Mock(wraps=registry.probe_package)
        lacking = mock.patch.dict(sys.modules, {"aiter.ops.mhc": None, "aiter.ops.triton.fusions.mhc": None})
        forgotten = mock.patch.object(REGISTRY, "_packages", {})
        with lacking, forgotten, mock.patch.object(registry, "probe_package", attempts):
            with aiter_asked_for(), self.assertLogs("sglang.kernels.registry", "WARNING") as logs:
                for _ in range(10_000):
                    self.assertIsNone(fused._get_triton_mhc_post_pre_ops())
                for _ in range(100):
                    hc_post_pre(*args)
                self.assertEqual(REGISTRY.chosen(hc_post_pre), "torch")
        asked = [call.args[0] for call in attempts.call_args_list]
        self.assertEqual(asked, ["aiter", "aiter.ops.mhc", "aiter.ops.triton.fusions.mhc"])
        self.assertEqual(len(logs.output), 2, logs.output)

    def test_ops_that_import(self) -> None:
        import aiter.ops.triton.fusions.mhc as vendors

        with aiter_asked_for():
            ops = fused._get_triton_mhc_post_pre_ops()
        assert ops is not None
        self.assertIs(ops[0], vendors.mhc_post_pre)


class TestScratch(OverFake):
    def test_partial_sums_alone(self) -> None:
        """Two tensors, of the shapes that the vendor computes for itself."""
        for rows, width in ((1, 320), (64, 4096), (3, 7168)):
            config = mhc_config(rows, width)
            assert config is not None
            products, squares = fused._get_fused_hc_post_pre_buffers(rows, 4, width, config, torch.device("cpu"))
            self.assertEqual(products.shape, (-(-width // 64), rows, 24))
            self.assertEqual(squares.shape, products.shape[:2])

    def test_graphs_and_an_eager_stream_in_turns(self) -> None:
        """Two recorded sizes and eager calls, over scratch that holds NaN before: each as if it were alone."""

        def poisoned(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            products, squares = partial_sums(*args)
            return products.fill_(torch.nan), squares.fill_(torch.nan)

        sizes = (8, 16)
        with aiter_asked_for(only="aiter_triton"):
            given = {rows: crossing(rows, 320, "cpu", seed=rows) for rows in sizes}
            side = self.platform.create_stream()
            poison = mock.patch("sglang.kernels.ops.mhc.hc_post_pre_aiter.partial_sums", poisoned)
            with poison:
                graphs = {rows: self.platform.create_graph() for rows in sizes}
                outputs = {rows: graphs[rows].capture(lambda rows=rows: hc_post_pre(*given[rows])) for rows in sizes}
            for turn in range(4):
                for rows in sizes:
                    fresh = crossing(rows, 320, "cpu", seed=100 * turn + rows)
                    for kept, part in zip(given[rows][:4], fresh[:4], strict=True):
                        kept.copy_(part)  # type: ignore[attr-defined]
                with poison:
                    graphs[8].replay()
                    with self.platform.use_stream(side):
                        eager = hc_post_pre(*crossing(5, 320, "cpu", seed=turn))
                    graphs[16].replay()
                found = {8: outputs[8], 16: outputs[16], 5: eager}
                for rows, args in ((8, given[8]), (16, given[16]), (5, crossing(5, 320, "cpu", seed=turn))):
                    for part, alone in zip(found[rows][:4], hc_post_pre(*args)[:4], strict=True):
                        self.assertTrue(torch.equal(part, alone), f"turn {turn}, {rows} rows")


class TestFakeRefuses(OverFake):
    """What AITER would answer with the wrong numbers."""

    def test_hip(self) -> None:
        from aiter import VendorWouldCorrupt
        from aiter.ops.mhc import mhc_fused_post_pre

        row, x, post, comb, fn, base, scale, *_, gain, _ = crossing(2, 1280, "cpu")
        rest = {"hc_scale": scale, "hc_base": base, "hc_post_mult_value": 2.0}
        mhc_fused_post_pre(row, x, post, comb, fn, **rest)
        for changes in ({"norm_weight": gain}, {"hc_base": base.double()}, {"is_fn_pack_bf16": 1}):
            with self.assertRaises(VendorWouldCorrupt):
                mhc_fused_post_pre(row, x, post, comb, fn, **{**rest, **changes})
        with self.assertRaises(VendorWouldCorrupt):
            mhc_fused_post_pre(row.float(), x, post, comb, fn, **rest)
        with self.assertRaisesRegex(AssertionError, "256"):
            mhc_fused_post_pre(row[:, :320], x[..., :320], post, comb, fn[:, :1280], **rest)
        with self.assertRaisesRegex(AssertionError, "dense"):
            mhc_fused_post_pre(row, x[:, 0].contiguous()[:, None].expand(-1, 4, -1), post, comb, fn, **rest)
        # Its own check reads the first stride alone.
        with self.assertRaises(VendorWouldCorrupt):
            mhc_fused_post_pre(row, x[:, :1].expand(-1, 4, -1), post, comb, fn, **rest)

    def test_triton(self) -> None:
        from aiter import VendorWouldCorrupt
        from aiter.ops.triton.fusions.mhc import mhc_post_pre

        row, x, post, comb, fn, base, scale, *_ = crossing(2, 320, "cpu")
        with self.assertRaisesRegex(VendorWouldCorrupt, "log domain"):
            mhc_post_pre(row, x, post, comb, fn.t(), scale, base, 4)
        with self.assertRaisesRegex(AssertionError, "phi"):
            mhc_post_pre(row, x, post, comb, fn, scale, base, 4, asymmetric_exp_domain=True)
        with self.assertRaisesRegex(AssertionError, "acc_partial"):
            scratch = torch.empty(4, 2, 24)
            mhc_post_pre(row, x, post, comb, fn.t(), scale, base, 4, asymmetric_exp_domain=True, acc_partial=scratch)

    def test_arguments_that_no_kernel_of_theirs_reads(self) -> None:
        """Each falls to the next implementation, and never reaches the vendor."""
        with fresh_decisions(), aiter_asked_for():
            REGISTRY.chosen(hc_post_pre)
            hip, triton = (impl for impl in hc_post_pre.impls if impl.name.startswith("aiter"))
            good = crossing(2, 512, "cpu")
            self.assertTrue(hip.accepts(*good) and triton.accepts(*good))
            for place, change in (
                (0, lambda t: t.float()), (1, lambda t: t.float()), (2, lambda t: t.bfloat16()), (3, lambda t: t.mT),
                (4, lambda t: t.bfloat16()), (5, lambda t: t.double()), (6, lambda t: t.bfloat16()),
                (1, lambda t: t[:, :2]),
            ):  # fmt: skip
                bad = list(good)
                bad[place] = change(bad[place])
                self.assertFalse(hip.accepts(*bad) or triton.accepts(*bad), f"argument {place}")
            self.assertFalse(hip.accepts(*crossing(2, 256, "cpu")), "a row of one block")
            self.assertFalse(hip.accepts(*good[:9], 0) or triton.accepts(*good[:9], 0), "no step of balancing")
            self.assertFalse(hip.accepts(*crossing(0, 512, "cpu")) or triton.accepts(*crossing(0, 512, "cpu")))


if __name__ == "__main__":
    unittest.main()
