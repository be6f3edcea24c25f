"""Speculation of DeepSeek V4 under HIP's policy, every step captured: the output is that of plain eager steps."""

import tempfile
import unittest
from unittest import mock

import torch

from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import DeepseekV4MultiStepBackend
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test import v4_mtp_serving
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import difference, prompts_around, serve

use_fakes()
register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

BUCKETS = [1, 4, 16]


class TestCapturedSpeculation(CustomTestCase):
    def test_answers_with_captured_steps(self):
        """At temperature 0 and 0.7, over ends of windows, entries and pages; 14 requests in buckets of 16."""
        torch.set_num_threads(1)
        folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(folder)
        prompts = prompts_around((1, 124, 126, 127, 252, 255, 511))
        wanted, _ = serve(folder, prompts)
        engines, real = [], v4_mtp_serving.EngineHarness
        with (
            fresh_decisions(),
            override_platform(RocmOverFakesPlatform(find_fakes())),
            mock.patch.object(
                v4_mtp_serving, "EngineHarness", lambda *a, **k: engines.append(real(*a, **k)) or engines[0]
            ),
        ):
            found, _ = serve(folder, prompts, 3, cuda_graph_bs=BUCKETS)
        self.assertEqual(difference(found, wanted, 1e-4), "")
        runner = engines[0].runner
        graphs = {**runner.draft_graphs, "verify": runner.decode_graphs}
        kinds = ["draft extend", "greedy accept", "greedy draft", "sampled accept", "sampled draft", "verify"]
        self.assertEqual(sorted(graphs), kinds)
        for name, captured in graphs.items():
            self.assertEqual((captured.refused, sorted(captured._steps)), ({}, BUCKETS), name)
        drafter = engines[0].worker.speculator.drafter
        self.assertIsInstance(drafter.decode_backend, DeepseekV4MultiStepBackend)
        self.assertEqual((len(drafter.decode_backend.children), drafter.extend_backend.rings), (2, {}))


if __name__ == "__main__":
    unittest.main()
