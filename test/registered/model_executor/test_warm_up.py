"""Warm-up steps stay within the limits and leave pools and answers as they were."""

from __future__ import annotations

import unittest
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels import compile_watch
from sglang.srt.layers.moe.token_dispatcher.gauge import RecvGauge
from sglang.srt.model_executor import warm_up
from sglang.srt.model_executor.warm_up import WarmUpStep, warm_up_steps
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")


class TestSteps(CustomTestCase):
    def test_every_size_class_is_there_and_none_is_too_large(self) -> None:
        for max_tokens, context in ((8192, 163840), (100, 50), (1, 4), (2048, 4096)):
            steps = warm_up_steps(max_tokens, context)
            self.assertEqual(len(steps), len(set(steps)))
            for step in steps:
                self.assertLessEqual(step.batch * step.tokens, max_tokens)
                self.assertLessEqual(step.prefix + step.tokens, context)
                self.assertGreater(step.tokens, 0)
            alone = {step.tokens for step in steps if step.batch == 1 and step.prefix == 0}
            self.assertLessEqual({1 << i for i in range(14) if 1 << i <= min(max_tokens, context)}, alone)
        self.assertIn(WarmUpStep(1, 8192, 0), warm_up_steps(8192, 163840))
        self.assertIn(WarmUpStep(1, 77, 8000), warm_up_steps(8192, 163840))


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
                pools = [*runner.kv_pool.buffers(), *(runner.state_pool.buffers() if runner.state_pool else ())]
                rows = [pool.clone() for pool in pools]
                with mock.patch.object(warm_up, "current_platform", mock.Mock(supports_graphs=True)):
                    warm_up.warm_up(runner, 32)
                for pool, before in zip(pools, rows, strict=True):
                    self.assertTrue(torch.equal(pool[:, 1:], before[:, 1:]))
                    self.assertTrue(bool(pool[:, 0].isfinite().all()))
                engine.submit("after", [5, 6, 7, 8], params)
                self.assertEqual(engine.run()["after"].output_ids, wanted)


class TestGauges(CustomTestCase):
    def test_warm_up_is_not_load(self) -> None:
        gauge = RecvGauge(64, 2, torch.device("cpu"))

        def dispatch(*_: object) -> None:
            gauge.plan(32, 3)
            gauge.add(torch.tensor([9], dtype=torch.int32), 20)
            gauge.count_raised()

        runner = mock.Mock(max_running_requests=2)
        runner.model_config.context_len = 8
        idle = gauge.snapshot()
        with (
            mock.patch.object(warm_up, "current_platform", mock.Mock(supports_graphs=True)),
            mock.patch.object(warm_up, "expert_gauges", return_value=[gauge]),
            mock.patch.object(warm_up, "run_step", side_effect=dispatch) as steps,
            mock.patch.multiple(warm_up, _extend_batch=mock.Mock(), _decode_batch=mock.Mock()),
        ):
            warm_up.warm_up(runner, 4)
        self.assertGreater(steps.call_count, 2)
        self.assertEqual(gauge.snapshot(), idle)
        dispatch()
        found = gauge.snapshot()
        self.assertEqual((found["live"], found["bound"], found["suggested_cap"], found["most_rounds"]), (9, 20, 32, 3))
        self.assertEqual(found["input_limit_raised"], 1)
        # A replayed graph adds rows on the device alone: the bound stays above them.
        gauge._since_read.fill_(7)
        found = gauge.snapshot()
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
