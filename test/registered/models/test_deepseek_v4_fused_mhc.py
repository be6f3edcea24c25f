"""DeepSeek V4 served with the crossing between sub-blocks as one op: gates, each level of fallback, the same tokens."""

from __future__ import annotations

import tempfile
import unittest
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.models import deepseek_v4
from sglang.srt.models.deepseek_common.amd import deepseek_v4_fused_mhc as fused
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test import v4_mtp_serving
from sglang.test.aiter_mhc_cases import aiter_asked_for, crossing
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

register_cpu_ci(est_time=45, suite="stage-b-test-cpu")

use_fakes()

OP = "mhc.hc_post_pre"
SIZES: dict[str, Any] = {"max_total_tokens": 2048, "max_running_requests": 4, "context_length": 512, "random_seed": 1}
PROMPTS = {"short": 9, "window": 140}
NEW_TOKENS = 6


@contextmanager
def machine(arch: str = "gfx950", version: str = "0.1.7") -> Iterator[None]:
    """HIP's policy for ``arch`` over an AITER of ``version``, everything decided again."""
    import aiter

    with override_platform(RocmOverFakesPlatform(find_fakes(), arch)), aiter.fake_version(version), fresh_decisions():
        yield


class TestGates(CustomTestCase):
    def test_rows(self) -> None:
        """None, one, the threshold and one more, with 24 coefficients and a width that is no multiple of 256."""
        with machine():
            limit = fused.max_fused_rows()
            self.assertEqual(limit, 64)
            for rows, runs in ((0, False), (1, True), (64, True), (65, False)):
                found = fused.try_fused_hc_post_pre(*crossing(rows, 320, "cpu"), max_rows=limit)
                self.assertEqual(found is not None, runs, rows)
                if found is not None:
                    shapes = [tuple(part.shape) for part in found[:4]]
                    self.assertEqual(shapes, [(rows, 4, 320), (rows, 320), (rows, 4), (rows, 4, 4)])
                    self.assertIs(found[4], True)

    def test_other_ranks(self) -> None:
        row, streams, *others = crossing(2, 64, "cpu")
        with machine():
            self.assertIsNone(fused.try_fused_hc_post_pre(row[None], streams, *others, max_rows=64))
            self.assertIsNone(fused.try_fused_hc_post_pre(row, streams.flatten(1), *others, max_rows=64))

    def test_architectures_and_the_switch(self) -> None:
        for arch, rows in (("gfx950", 64), ("gfx942", 0), ("sm_90", 256)):
            with machine(arch):
                self.assertEqual(fused.max_fused_rows(), rows)
                with envs.SGLANG_OPT_USE_TRITON_FUSED_MHC.override(False):
                    self.assertEqual(fused.max_fused_rows(), 0)
        self.assertEqual(fused.max_fused_rows(), 0, "a CPU has no entry")

    def test_outputs_are_new(self) -> None:
        """Later calls change neither returned tensors nor arguments."""
        with machine(), aiter_asked_for():
            args = crossing(3, 512, "cpu")
            before = [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]
            first = fused.try_fused_hc_post_pre(*args, max_rows=64)
            kept = [part.clone() for part in first[:4]]
            fused.try_fused_hc_post_pre(*crossing(3, 512, "cpu", seed=1), max_rows=64)
            for part, copy in zip(first[:4], kept, strict=True):
                self.assertTrue(torch.equal(part, copy))
            for arg, copy in zip((arg for arg in args if isinstance(arg, torch.Tensor)), before, strict=True):
                self.assertTrue(torch.equal(arg, copy))


class TestServed(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.folders: dict[int, str] = {}
        generator = torch.Generator().manual_seed(5)
        cls.prompts = {rid: torch.randint(3, 512, (n,), generator=generator).tolist() for rid, n in PROMPTS.items()}

    def folder(self, hidden: int) -> str:
        if hidden not in self.folders:
            self.folders[hidden] = self.enterClassContext(tempfile.TemporaryDirectory())
            save_tiny_checkpoint("dsv4", self.folders[hidden], hidden_size=hidden)
        return self.folders[hidden]

    def serve(self, hidden: int, **options: Any) -> tuple[EngineHarness, list[list[int]], torch.Tensor]:
        """Greedy tokens, and log-probabilities of the prompts' ends and of the first tokens."""
        engine = EngineHarness(self.folder(hidden), **SIZES, **options)
        params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        for rid, prompt in self.prompts.items():
            engine.submit(rid, prompt, params, return_logprob=True)
        results = engine.run()
        firsts = torch.tensor([results[rid].output_logprobs.logprobs[:2] for rid in self.prompts])
        return engine, [results[rid].output_ids for rid in self.prompts], firsts

    def row(self, engine: EngineHarness) -> dict[str, Any]:
        """What /server_info shows of the op."""
        (found,) = (row for row in engine.scheduler.config.describe()["kernels"] if row["op"] == OP)
        return found

    def test_same_tokens_on_and_off(self) -> None:
        """In float32, with decode steps captured and eager, to the last bit of a log-probability nearly."""
        for options in ({"disable_cuda_graph": True}, {"cuda_graph_bs": [1, 2, 4]}):
            with machine(), self.subTest(**options):
                real = fused.try_fused_hc_post_pre
                with mock.patch.object(deepseek_v4, "try_fused_hc_post_pre", wraps=real) as tried:
                    engine, tokens, firsts = self.serve(128, **options)
                self.assertGreater(tried.call_count, 11)
                self.assertEqual(self.row(engine)["chosen"], "torch")
                with envs.SGLANG_OPT_USE_TRITON_FUSED_MHC.override(False):
                    _, plain_tokens, plain = self.serve(128, **options)
                self.assertEqual(tokens, plain_tokens)
                self.assertLess(float((firsts - plain).abs().max()), 1e-5)

    def test_ops_of_a_decode_step(self) -> None:
        """Six layers: one hc_pre, eleven fused steps, and one hc_post before the head reads the streams."""
        with machine():
            engine = EngineHarness(self.folder(128), **SIZES, disable_cuda_graph=True)
            params = SamplingParams(temperature=0.0, max_new_tokens=3, ignore_eos=True)
            engine.submit("one", self.prompts["short"], params)
            engine.step()
            calls: Counter[str] = Counter()
            for name in ("hc_pre", "hc_post", "hc_head", "try_fused_hc_post_pre"):
                real = getattr(deepseek_v4, name)

                def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                    calls[name] += 1
                    return real(*args, **kwargs)

                self.enterContext(mock.patch.object(deepseek_v4, name, counted))
            engine.step()
            self.assertEqual(calls, {"hc_pre": 1, "try_fused_hc_post_pre": 11, "hc_post": 1, "hc_head": 1})

    def levels(self) -> Iterator[tuple[str, int, ExitStack, str, str]]:
        """Name, width, what is in force, the implementation that is chosen, and a part of why AITER's is not."""
        lacking = {"aiter.ops.mhc": None, "aiter.ops.triton.fusions.mhc": None}
        for name, hidden, version, chosen, reason in (
            ("hip kernel", 512, "0.1.14", "aiter", "ok"),
            ("triton kernels", 128, "0.1.14", "aiter", "ok"),
            ("old", 512, "0.1.13", "torch", "aiter is 0.1.13, this needs 0.1.14"),
            ("absent", 512, "0.1.14", "torch", "aiter.ops.mhc does not import"),
        ):
            stack = ExitStack()
            stack.enter_context(machine(version=version))
            if name == "absent":
                stack.enter_context(mock.patch.dict("sys.modules", lacking))
                stack.enter_context(mock.patch.object(REGISTRY, "_packages", {}))
            stack.enter_context(aiter_asked_for())
            yield name, hidden, stack, chosen, reason

    def test_each_level(self) -> None:
        """In bfloat16, by what AITER has, and by the reference without it; /server_info says which and why."""
        plain: dict[int, torch.Tensor] = {}
        for hidden in (128, 512):
            with machine(), envs.SGLANG_OPT_USE_TRITON_FUSED_MHC.override(False):
                plain[hidden] = self.serve(hidden, dtype="bfloat16", cuda_graph_bs=[2])[2]
        for name, hidden, stack, chosen, reason in self.levels():
            with self.subTest(name), stack:
                hip = "aiter.ops.mhc.mhc_fused_post_pre"
                triton = "aiter.ops.triton.fusions.mhc.mhc_post_pre"
                called = {}
                for key, path in (("hip kernel", hip), ("triton kernels", triton)) if chosen == "aiter" else ():
                    module, _, attribute = path.rpartition(".")
                    real = getattr(__import__(module, fromlist=["x"]), attribute)
                    called[key] = stack.enter_context(mock.patch(path, wraps=real))
                engine, _, firsts = self.serve(hidden, dtype="bfloat16", cuda_graph_bs=[2])
                row = self.row(engine)
                self.assertEqual(row["chosen"], chosen)
                self.assertIn(reason, row["implementations"]["aiter"])
                for key, calls in called.items():
                    self.assertEqual(calls.call_count > 0, key == name or key == "triton kernels", key)
                self.assertLess(float((firsts - plain[hidden]).abs().max()), 0.08)

    def test_drafts_and_their_streams(self) -> None:
        """The MTP layer reads the target's streams and its own, each after its last hc_post."""
        folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(folder)
        prompts = v4_mtp_serving.prompts_around((1, 126))
        with machine():
            found, _ = v4_mtp_serving.serve(folder, prompts, 3, cuda_graph_bs=[4])
            with envs.SGLANG_OPT_USE_TRITON_FUSED_MHC.override(False):
                wanted, _ = v4_mtp_serving.serve(folder, prompts)
        self.assertEqual(v4_mtp_serving.difference(found, wanted, 1e-4), "")


if __name__ == "__main__":
    unittest.main()
