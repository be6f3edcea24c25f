"""Warm-up steps stay within the limits and leave pools and answers as they were."""

from __future__ import annotations

import contextlib
import io
import random
import unittest
from collections import Counter
from collections.abc import Iterator
from itertools import product
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels import compile_watch
from sglang.kernels.ops.attention.extend_attention import extend_attention_triton
from sglang.kernels.ops.attention.extend_ragged import extend_ragged_triton
from sglang.kernels.ops.attention.kv_cache import gather_slots_triton
from sglang.kernels.registry import REGISTRY
from sglang.srt.layers.moe.token_dispatcher.recv_stats import RecvStats
from sglang.srt.model_executor import warm_up
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.warm_up import WarmUpStep, warm_up_steps
from sglang.srt.platforms import override_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.amd_gate import shape_walk
from sglang.test.amd_gate.driver import compile_only
from sglang.test.amd_gate.walk import ShapeOnlyPlatform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group

register_cpu_ci(est_time=16, suite="stage-a-test-cpu")


class TestSteps(CustomTestCase):
    def test_every_size_class_is_there_and_none_is_too_large(self) -> None:
        for max_tokens, context in ((8192, 163840), (100, 50), (1, 4), (2048, 4096)):
            steps = warm_up_steps(max_tokens, context)
            self.assertEqual(len(steps), len(set(steps)))
            for step in steps:
                self.assertLessEqual(sum(new for new, _ in step), max_tokens)
                self.assertLessEqual(max(new + cached for new, cached in step), context)
                self.assertGreater(min(new for new, _ in step), 0)
            alone = {new for ((new, cached), *others) in steps if not cached and not others}
            self.assertLessEqual({1 << i for i in range(14) if 1 << i <= min(max_tokens, context)}, alone)
        for step in (((8192, 0),), ((77, 8000),), ((25, 64),) * 3, warm_up.MIXED):
            self.assertIn(step, warm_up_steps(8192, 163840))
        self.assertNotIn(warm_up.MIXED, warm_up_steps(79, 163840))


class TestOnModels(CustomTestCase):
    def test_nothing_is_left_behind(self) -> None:
        torch.set_num_threads(1)
        for name in ("deepseek-v3-tiny", "qwen3.5-moe-tiny"):
            with self.subTest(model=name):
                engine = EngineHarness(str(EMBEDDED_MODELS[name]), max_total_tokens=512, max_running_requests=5)
                params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
                engine.submit("before", [5, 6, 7, 8], params)
                wanted = engine.run()["before"].output_ids
                runner = engine.runner
                pools = runner.pools.buffers()
                rows = [pool.clone() for pool in pools]
                with mock.patch.object(warm_up, "current_platform", mock.Mock(supports_graphs=True)):
                    warm_up.warm_up(runner, 32)
                for pool, before in zip(pools, rows, strict=True):
                    self.assertTrue(torch.equal(pool[:, 1:], before[:, 1:]))
                    self.assertTrue(bool(pool[:, 0].isfinite().all()))
                engine.submit("after", [5, 6, 7, 8], params)
                self.assertEqual(engine.run()["after"].output_ids, wanted)


class TestDrafts(CustomTestCase):
    def test_steps_of_the_layer_that_drafts_are_run(self) -> None:
        """Over prompts, over the rows of verify steps, and in chains; nothing is left behind."""
        torch.set_num_threads(1)
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
        sizes = {"max_total_tokens": 512, "max_running_requests": 5}
        for name in ("deepseek-v3-tiny", "qwen3.5-moe-tiny"):
            with self.subTest(model=name):
                engine = EngineHarness(str(EMBEDDED_MODELS[name]), **sizes, **spec)
                params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
                worker, runner, seen = engine.worker, engine.runner, set()
                draft = worker.speculator.drafter.model.forward

                def watched(ids, positions, forward_batch, hidden, draft=draft, seen=seen):
                    seen.add((forward_batch.forward_mode, forward_batch.batch_size, len(ids)))
                    return draft(ids, positions, forward_batch, hidden)

                engine.submit("before", [5, 6, 7, 8], params)
                wanted = engine.run()["before"].output_ids
                pools = runner.pools.buffers()
                rows = [pool.clone() for pool in pools]
                with (
                    mock.patch.object(worker.speculator.drafter.model, "forward", watched),
                    mock.patch.object(warm_up, "current_platform", mock.Mock(supports_graphs=True)),
                ):
                    warm_up.warm_up(runner, 32, worker.run_step, worker.decode_kind)
                prompts = {(sum(new for new, _ in step), len(step)) for step in warm_up_steps(32, 1000)}
                for tokens, size in prompts:
                    self.assertIn((ForwardMode.EXTEND, size, tokens), seen)
                for size in (1, 2, 4, 5):
                    self.assertIn((ForwardMode.TARGET_VERIFY, size, 4 * size), seen)
                    self.assertIn((ForwardMode.DECODE, size, size), seen)
                for pool, before in zip(pools, rows, strict=True):
                    self.assertTrue(torch.equal(pool[:, 1:], before[:, 1:]))
                    self.assertTrue(bool(pool[:, 0].isfinite().all()))
                padding = runner.req_to_token_pool.padding_row
                for left in (runner.last_token, runner.relay.committed, runner.relay.drafts):
                    self.assertEqual(int(left[padding].abs().sum()), 0)
                engine.submit("after", [5, 6, 7, 8], params)
                self.assertEqual(engine.run()["after"].output_ids, wanted)


class CudaShapes(ShapeOnlyPlatform):
    """The same of an H100."""

    kind = "cuda"

    def memory_info(self, local_rank: int) -> tuple[int, int]:
        return 80 << 30, 80 << 30


def serving_steps() -> Iterator[WarmUpStep]:
    """Few and many requests of odd lengths, all alike or not, with and without prefixes."""
    for batch in (1, 2, 3, 8, 9, 127):
        for total in (batch, 131, 8191):
            lengths = [total // batch + (i < total % batch) for i in range(batch)]
            for prefix in (0, 4099):
                yield tuple((new, prefix and prefix + 13 * i) for i, new in enumerate(lengths) if new)
    draw = random.Random(0)
    for _ in range(20):
        batch = draw.choice((1, 2, 3, 5, 8, 9, 16, 33))
        yield tuple((draw.choice((1, 2, 16, 17, 100)), draw.choice((0, 16, 999, 5000))) for _ in range(batch))


class TestCompiledKernels(CustomTestCase):
    """Kernels are specialised as on the GPU, without being compiled: serving must not meet a new specialisation."""

    MAX_TOKENS = 8192

    def check_model(self, model: shape_walk.WalkedModel, arch: str) -> None:
        group = shape_walk.ShapeOnlyGroup(size=model.settings.get("tp_size", 1))
        with (
            override_tp_group(group),
            contextlib.ExitStack() as settings,
            contextlib.redirect_stderr(io.StringIO()),
            compile_only(arch, lambda kernel, digest: True) as driver,
        ):
            runners: list[shape_walk.ShapeRunner] = []
            shape_walk._load(model, settings, runners)
            settings.enter_context(shape_walk._PinsNothing())
            (runner,) = runners
            warm_up._run_steps(runner, warm_up_steps(self.MAX_TOKENS, runner.model_config.context_len))
            met = {launch.digest for launch in driver.launches}
            self.assertGreater(len(met), 30)
            driver.launches.clear()
            for step in serving_steps():
                runner.extend(step)
                self.assertEqual({x.kernel for x in driver.launches if x.digest not in met}, set(), step[:9])
                driver.launches.clear()
            for batch in (1, 3, 5, 9, 100, 127):
                warm_up.run_step(runner, warm_up._decode_batch(runner, batch))
                self.assertEqual({x.kernel for x in driver.launches if x.digest not in met}, set(), f"decode {batch}")
            filters = ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1})
            edits = ({}, {"presence_penalty": 1.0}, {"logit_bias": {"7": 3.0}}, {"min_new_tokens": 3})
            words = -(-runner.model_config.vocab_size // 32)
            for temperature, some, edit, masked in product((0.0, 1.0), filters, edits, (False, True)):
                fields = {"temperature": temperature, **some, **edit}
                for batch in (1, 5):
                    params = [SamplingRow(SamplingParams(**fields), 0, (), (), (3,)) for _ in range(batch)]
                    info = SamplingBatchInfo.from_rows(params, runner.model_config.vocab_size, runner.device)
                    if masked:
                        info.vocab_mask = torch.empty(batch, words, dtype=torch.int32, device=runner.device)
                    step = warm_up._decode_batch(runner, batch)
                    runner.sample(runner.forward(step), info, step)
                new = {x.kernel for x in driver.launches if x.digest not in met}
                self.assertEqual(new, set(), f"{fields}, masked {masked}")
                driver.launches.clear()

    def test_pieces_of_one_upload_may_start_anywhere(self) -> None:
        upload = torch.empty(64, dtype=torch.int64, device="meta")
        table = torch.empty(8, 4096, dtype=torch.int32, device="meta")
        rows = torch.empty(4096, 2, 128, dtype=torch.bfloat16, device="meta")
        with compile_only("sm_90", lambda kernel, digest: True) as driver:
            for starts in product((0, 1), repeat=3):
                pieces = [upload[8 * i + start :] for i, start in enumerate(starts)]
                first, second, bounds = pieces[0][:3], pieces[1][:3], pieces[2][:4]
                gather_slots_triton(table, first, second, bounds, 4096)
                extend_attention_triton(rows, rows, rows, pieces[0], pieces[1][:4], bounds, 0.1)
                extend_ragged_triton(rows, rows, rows, pieces[1][:4], bounds, 0.1)
        met = Counter(launch.kernel for launch in {launch.digest: launch for launch in driver.launches}.values())
        self.assertEqual(met, {"gather_slots_kernel": 1, "extend_kernel": 2})

    def test_no_step_needs_a_kernel_that_warm_up_did_not_meet(self) -> None:
        wanted = {"sm_90": ("v2lite", "qwen35"), "gfx950": ("v3-fp8-tp8-kv8",)}
        for arch, names in wanted.items():
            platform = CudaShapes(arch) if arch.startswith("sm") else ShapeOnlyPlatform(arch)
            with override_platform(platform), fresh_decisions():
                REGISTRY.freeze()
                for model in shape_walk.WALKED_MODELS:
                    if model.name in names:
                        with self.subTest(model=model.name, arch=arch):
                            self.check_model(model, arch)


class TestGauges(CustomTestCase):
    def test_warm_up_is_not_load(self) -> None:
        recv_stats = RecvStats(64, torch.device("cpu"))

        def dispatch(*_: object) -> None:
            recv_stats.record_step(32, 3)
            recv_stats.record_dispatch(torch.tensor([9], dtype=torch.int32), 20)
            recv_stats.record_raised_limit()

        runner = mock.Mock()
        runner.req_to_token_pool.size, runner.relay = 2, None
        runner.model_config.context_len = 8
        idle = recv_stats.snapshot()
        with (
            mock.patch.object(warm_up, "current_platform", mock.Mock(supports_graphs=True)),
            mock.patch.object(warm_up, "expert_recv_stats", return_value=[recv_stats]),
            mock.patch.object(warm_up, "run_step", side_effect=dispatch) as steps,
            mock.patch.multiple(warm_up, _extend_batch=mock.Mock(), _decode_batch=mock.Mock()),
        ):
            warm_up.warm_up(runner, 4)
        self.assertGreater(steps.call_count, 2)
        self.assertEqual(recv_stats.snapshot(), idle)
        dispatch()
        found = recv_stats.snapshot()
        self.assertEqual((found["live"], found["bound"], found["suggested_cap"], found["most_rounds"]), (9, 20, 32, 3))
        self.assertEqual(found["input_limit_raised"], 1)
        # A replayed graph adds rows on the device alone: the bound stays above them.
        recv_stats._since_read.fill_(7)
        found = recv_stats.snapshot()
        self.assertLessEqual(found["live"], found["bound"])


class TestCompileWatch(CustomTestCase):
    def test_a_kernel_is_said_once_and_counted(self) -> None:
        with mock.patch.object(compile_watch, "_compiled", type(compile_watch._compiled)()):
            kernel = mock.Mock()
            kernel.name = "module.some_kernel"
            with self.assertLogs(compile_watch.logger, "WARNING") as logs:
                compile_watch._on_compiled(fn=kernel, repr="(x: i32)")
                compile_watch._on_compiled(fn=kernel, repr="(x: i64)")
            self.assertEqual(len(logs.output), 1)
            self.assertIn("some_kernel", logs.output[0])
            self.assertEqual(compile_watch.compiled_while_serving(), {"some_kernel": 2})


if __name__ == "__main__":
    unittest.main()
