"""Captured steps of speculation under HIP's policy on a CPU; other models and lengths run nightly."""

from __future__ import annotations

import unittest
from functools import partial
from unittest import mock

import torch

from sglang.kernels.registry import fresh_decisions
from sglang.srt.layers.attention.triton_backend import TritonMlaBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner_build import prove_graphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.speculative.draft_graphs import DRAWN, EXTEND, GREEDY
from sglang.srt.speculative.spec_info import DRAFT
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import use_fakes
from sglang.test.spec_graph_cases import SpecGraphs, VerifyCases, no_call_left_out
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=45, suite="stage-b-test-cpu")


class OverFakes(SpecGraphs, CustomTestCase):
    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())


class TestVerify(OverFakes, VerifyCases):
    STEPS = (3,)


class TestRefusal(OverFakes):
    def test_a_kind_that_cannot_be_captured_runs_eagerly_alone(self) -> None:
        """By its name, and with the same tokens."""
        wanted = self.tokens(self.engine(0, disable_cuda_graph=True))
        plan = TritonMlaBackend.plan_decode

        def reads_the_host(backend: TritonMlaBackend, fb: ForwardBatch) -> object:
            _ = len(fb.seq_lens_cpu) if fb.kind == DRAFT else None
            return plan(backend, fb)

        with mock.patch.object(TritonMlaBackend, "plan_decode", reads_the_host):
            engine = self.engine(3, cuda_graph_bs=[4])
            graphs = engine.runner.describe()["graphs"]
            self.assertEqual([kind for kind, told in graphs.items() if told["captured"]], ["verify", EXTEND])
            for name in (GREEDY, DRAWN):
                self.assertIn("a host-side list of the batch is read", graphs[name]["refused"]["4"])
            self.assertEqual(self.tokens(engine), wanted)
        self.assertGreater(engine.scheduler.metrics.num_accepted_drafts, 0)


class TestProof(OverFakes):
    @torch.inference_mode()
    def test_a_replay_that_leaves_one_call_out_is_refused(self) -> None:
        engine = self.engine(2, cuda_graph_bs=[2])
        graphs = engine.runner.decode_graphs
        assert graphs is not None
        no_call_left_out(self, graphs, lambda: prove_graphs(engine.runner, graphs), 15)
        drafts = engine.worker.speculator.drafter.graphs
        extend = drafts.extend_graphs
        no_call_left_out(self, extend, lambda: drafts.prove(extend, drafts.extend_body), 12)
        # A drawn id says little of the position that it is drawn for, so the chain of greedy ones.
        chain = drafts.chains[GREEDY]
        no_call_left_out(self, chain, partial(drafts.prove, chain, partial(drafts.chain_body, True)), 16)


if __name__ == "__main__":
    unittest.main()
