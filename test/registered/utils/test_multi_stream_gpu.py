"""On a GPU: two streams compute what one computes, bit for bit, however long either side takes.

Its CPU sibling is test_multi_stream.py (the same sites under the race finder).
"""

import json
import random
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.arg_groups.stream_policy import SITE_RULES
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils import multi_stream_utils
from sglang.srt.utils.multi_stream_utils import OverlapSite, StreamOverlap
from sglang.srt.utils.overlap_trace import merge_rows
from sglang.test.ci.ci_register import register_amd_ci, register_cuda_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import KERNEL_SIZED_CONFIGS, whole_config

register_cuda_ci(est_time=90, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=180, suite="stage-b-test-1-gpu-small-amd-mi35x")

ARCHITECTURES = {
    "dsv3-k": "DeepseekV3ForCausalLM",
    "q35moe-k": "Qwen3_5MoeForCausalLM",
    "dsv4-k": "DeepseekV4ForCausalLM",
}
EAGER = OverlapSite("test", enabled=True, capture_only=False)
# Some milliseconds at any clock: longer than every kernel here.
LONG = 10_000_000
WHOLE_ISSUE = multi_stream_utils._issue


def after(cycles, body):
    """``body`` after a kernel that waits ``cycles`` of the device's clock."""

    def delayed():
        if cycles:
            torch.cuda._sleep(cycles)
        return body()

    return delayed


def random_delays(seed, most):
    """Every fork waits a random time before its side, its main work, or both."""
    generator = random.Random(seed)

    def issue(alt, side, main):
        cycles = [generator.choice((0, generator.randrange(most))) for _ in range(2)]
        return WHOLE_ISSUE(alt, after(cycles[0], side), after(cycles[1], main))

    return mock.patch.object(multi_stream_utils, "_issue", issue)


def chain(overlap, x, weight):
    """Forks in a row, each fed by the one before; the host runs far ahead, so freed memory is given out again."""
    for _ in range(12):
        h = torch.tanh(x @ weight)
        side, main = overlap.fork_join(lambda h=h: torch.relu(h @ weight), lambda h=h: (h @ weight).sin(), x.shape[0])
        x = side + main
    return x


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestForkJoinOnGpu(CustomTestCase):
    def setUp(self):
        torch.manual_seed(1)
        self.x = torch.randn(64, 512, device="cuda")
        self.weight = torch.randn(512, 512, device="cuda") / 512**0.5
        self.alt = current_platform.create_stream()
        self.serial = chain(StreamOverlap(), self.x, self.weight)
        torch.cuda.synchronize()

    def test_eager_with_random_delays(self):
        for seed in range(8):
            with random_delays(seed, LONG // 10):
                found = chain(StreamOverlap(self.alt, EAGER), self.x, self.weight)
            self.assertTrue(torch.equal(found, self.serial), seed)

    def test_captured_with_random_delays(self):
        for seed in range(4):
            graph = current_platform.create_graph()
            with random_delays(seed, LONG // 10):
                found = graph.capture(lambda: chain(StreamOverlap(self.alt), self.x, self.weight))
            for _ in range(3):
                found.zero_()
                graph.replay()
                self.assertTrue(torch.equal(found, self.serial), seed)

    def test_the_delays_would_show_a_missing_wait(self):
        x, result = torch.zeros(1024, device="cuda"), []

        def body(wait_stream, side_cycles, main_cycles):
            value = float(len(result) + 1)  # never what an earlier run left in memory
            x.zero_()
            torch.cuda.synchronize()
            with mock.patch.object(torch.cuda.Stream, "wait_stream", wait_stream):
                torch.cuda._sleep(main_cycles)
                x.fill_(value)
                side, _ = StreamOverlap(self.alt, EAGER).fork_join(after(side_cycles, lambda: x + 1), lambda: None, 1)
                result.append(side + 1)
            torch.cuda.synchronize()
            return result[-1].tolist() == [value + 2] * 1024

        def no_fork(waiter, awaited, whole=torch.cuda.Stream.wait_stream):
            return None if waiter == self.alt else whole(waiter, awaited)

        def no_join(waiter, awaited, whole=torch.cuda.Stream.wait_stream):
            return None if awaited == self.alt else whole(waiter, awaited)

        whole = torch.cuda.Stream.wait_stream
        for side_cycles, main_cycles in ((0, LONG), (LONG, 0), (LONG, LONG)):
            self.assertTrue(body(whole, side_cycles, main_cycles))
        self.assertFalse(body(no_fork, 0, LONG))
        self.assertFalse(body(no_join, LONG, 0))

    def test_the_tracer_sees_what_ran_beside(self):
        with envs.SGLANG_TRACE_OVERLAP.override(True):
            eager, captured = StreamOverlap(self.alt, EAGER), StreamOverlap(self.alt)
        graph = current_platform.create_graph()
        sides = after(LONG, lambda: None), after(2 * LONG, lambda: None)
        eager.fork_join(*sides, num_tokens=3)
        graph.capture(lambda: captured.fork_join(*sides, num_tokens=3))
        torch.cuda.synchronize()
        self.assertEqual([row["captured"] for row in merge_rows([eager.trace, captured.trace])], [False])
        graph.replay()
        torch.cuda.synchronize()
        rows = merge_rows([eager.trace, captured.trace])
        if torch.version.hip is None:
            self.assertEqual([row["captured"] for row in rows], [False, True])
        for row in rows:
            self.assertGreater(row["overlap_fraction"], 0.5, row)
            self.assertGreater(row["main_us"], row["side_us"] * 1.5, row)


QK_NORM = "qwen3_5.qk_norm"


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class TestModelsOnGpu(CustomTestCase):
    """Both model families, decode graphs on: all sites overlapped against none."""

    def run_model(self, folder, state, but=(), **settings):
        """(tokens and log-probabilities by request, runner) of a few prompts, every site ``state`` but some off."""
        sites = ",".join(f"{rule.name}={'off' if rule.name in but else state}" for rule in SITE_RULES)
        options = {"max_total_tokens": 4096, "max_running_requests": 8, "random_seed": 1, "load_format": "dummy"}
        options["disable_shared_experts_fusion"] = True  # it leaves nothing to overlap
        with envs.SGLANG_STREAM_SITES.override(sites), fresh_decisions():
            engine = EngineHarness(folder, overlap=True, skip_tokenizer_init=True, **{**options, **settings})
            generator = random.Random(5)
            params = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
            for number, length in enumerate((1, 7, 140, 97, 33)):
                prompt = [generator.randrange(3, 512) for _ in range(length)]
                engine.submit(f"r{number}", prompt, params, return_logprob=True)
            results = engine.run()
        return {rid: (r.output_ids, r.output_logprobs.logprobs) for rid, r in results.items()}, engine.runner

    def test_overlap_changes_no_bit(self):
        for name, architecture in ARCHITECTURES.items():
            with tempfile.TemporaryDirectory() as folder:
                config = {**whole_config(name), "architectures": [architecture]}
                Path(folder, "config.json").write_text(json.dumps(config))
                for dtype in ("float32", "bfloat16"):
                    serial, _ = self.run_model(folder, "off", dtype=dtype)
                    for seed in range(3):
                        with self.subTest(model=name, dtype=dtype, seed=seed), random_delays(seed, LONG // 100):
                            found, runner = self.run_model(folder, "on", but=[QK_NORM], dtype=dtype)
                            self.assertEqual(runner.decode_graphs.refused, {})
                            self.assertEqual(found, serial)
                    with self.subTest(model=name, dtype=dtype), random_delays(9, LONG // 100):
                        found, _ = self.run_model(folder, "on", dtype=dtype)
                        self.assert_close(found, serial)

    def assert_close(self, found, wanted):
        """Same tokens; without that site q and k are normed by the kernel that also turns and stores them."""
        for rid, (ids, logprobs) in wanted.items():
            self.assertEqual(found[rid][0], ids)
            torch.testing.assert_close(torch.tensor(found[rid][1]), torch.tensor(logprobs), rtol=0, atol=1e-4)

    def test_the_tracer_reports_every_site_of_a_model(self):
        with tempfile.TemporaryDirectory() as folder:
            config = {**KERNEL_SIZED_CONFIGS["q35moe-k"], "architectures": [ARCHITECTURES["q35moe-k"]]}
            Path(folder, "config.json").write_text(json.dumps(config))
            with envs.SGLANG_TRACE_OVERLAP.override(True):
                _, runner = self.run_model(folder, "on", dtype="bfloat16")
        if torch.version.hip is None:
            sites = {row["site"] for row in runner.describe()["streams"]["trace"]}
            self.assertEqual(sites, {rule.name for rule in SITE_RULES if rule.name.startswith("qwen3_5.")})


if __name__ == "__main__":
    unittest.main()
