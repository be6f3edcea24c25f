"""Captured steps of speculation under HIP's policy on a CPU; other models and lengths run nightly."""

from __future__ import annotations

import unittest
from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.layers.attention.triton_backend import TritonMlaBackend
from sglang.srt.managers.tp_worker import LaunchedForward
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner_build import prove_graphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.accept_graphs import GREEDY_ACCEPT, SAMPLED_ACCEPT
from sglang.srt.speculative.draft_graphs import EXTEND, GREEDY, SAMPLED
from sglang.srt.speculative.spec_info import DRAFT
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.spec_graph_cases import KINDS, RUN, SpecGraphs, VerifyCases, no_call_left_out
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=45, suite="stage-b-test-cpu")


class OverFakes(SpecGraphs, CustomTestCase):
    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())


class TestVerify(OverFakes, VerifyCases):
    STEPS = (3,)


class Computed(TorchDispatchMode):
    """Names of the operations that run inside the block, except those of a replay and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.replaying = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.replaying and not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return result

    def run(self, graphs: BucketGraphs[Any], bucket: int) -> Any:
        self.replaying = True
        try:
            return RUN(graphs, bucket)
        finally:
            self.replaying = False


class TestBetweenGraphs(OverFakes):
    def test_nothing_is_computed(self) -> None:
        """A step without edits runs nothing after its forward except the copy to the host and the store of drafts."""
        engine = self.engine(3, cuda_graph_bs=[4])
        sample, computed = LaunchedForward.sample, Computed()

        def watched(launched: LaunchedForward, *args: Any) -> object:
            if launched._batch.kind is None:
                return sample(launched, *args)
            with computed:
                return sample(launched, *args)

        params = {"max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 1}
        with (
            mock.patch.object(LaunchedForward, "sample", watched),
            mock.patch.object(BucketGraphs, "run", lambda *args: computed.run(*args)),
        ):
            for kind, copies in ((KINDS[0], 0), (KINDS[1], 6)):
                with self.subTest(**kind):
                    computed.names.clear()
                    before = engine.scheduler.metrics.num_decode_steps
                    engine.submit("one", self.prompts[0], SamplingParams(**params, **kind))
                    engine.run()
                    steps = engine.scheduler.metrics.num_decode_steps - before
                    self.assertGreater(steps, 2)
                    # Nobody reads drafts after the last step.
                    wanted = {"clone": steps, "index_copy_": steps - 1} | ({"copy_": copies} if copies else {})
                    self.assertEqual(computed.names, wanted)


class TestLaunches(OverFakes):
    def test_few_around_the_layers(self) -> None:
        """Each is a small kernel on a device, in every step."""
        engine = self.engine(1, cuda_graph_bs=[2])
        assert engine.runner.decode_graphs is not None
        graphs = [engine.runner.decode_graphs, *engine.runner.draft_graphs.values()]
        calls = {each.name: [call.name for call in each._steps[2].graph._calls] for each in graphs}  # type: ignore
        for name, most in (("verify", 7), (EXTEND, 1)):
            self.assertLessEqual(calls[name].index("aten.embedding.default"), most, calls[name])
        self.assertLessEqual(len(calls[GREEDY_ACCEPT]), 24, calls[GREEDY_ACCEPT])


class TestMadeOnTheHost(OverFakes):
    def answers(self, engine: EngineHarness) -> dict[str, tuple[list[int], list[float]]]:
        """Results of a request with a grammar and of one with log-probabilities, served one after the other."""
        params = {"temperature": 0.0, "max_new_tokens": 9, "ignore_eos": True}
        form = grammar_of("regex", "[a-z]{3,9}-[0-9]{2,4}", {})
        for rid, fields in (("form", {"grammar": form}), ("scored", {"return_logprob": True})):
            engine.submit(rid, self.prompts[0], SamplingParams(**params), **fields)
            engine.run()
        return {rid: (told.output_ids, told.output_logprobs.logprobs) for rid, told in engine.results.items()}

    def test_masks_and_scores_are_no_part_of_a_graph(self) -> None:
        """With them a verify step is replayed, and sampled eagerly."""
        wanted = self.answers(self.engine(0, disable_cuda_graph=True))
        self.assertEqual([len(wanted[rid][1]) for rid in ("form", "scored")], [0, 9])
        engine, replayed = self.engine(3, cuda_graph_bs=[1]), Counter[str]()
        names = [GREEDY_ACCEPT, SAMPLED_ACCEPT, "verify", EXTEND]

        def run(graphs: BucketGraphs[Any], bucket: int) -> Any:
            replayed[graphs.name] += 1
            return RUN(graphs, bucket)

        with mock.patch.object(BucketGraphs, "run", run):
            found = self.answers(engine)
        self.assertEqual([bool(replayed[name]) for name in names], [False, False, True, True])
        for rid, (ids, logprobs) in wanted.items():
            self.assertEqual(found[rid][0], ids)
            np.testing.assert_allclose(found[rid][1], logprobs, atol=1e-4)


class TestRefusal(OverFakes):
    def test_a_kind_that_cannot_be_captured_runs_eagerly_alone(self) -> None:
        """The refused graph is named, and the tokens are the same."""
        wanted = self.tokens(self.engine(0, disable_cuda_graph=True))
        plan = TritonMlaBackend.plan_decode

        def reads_the_host(backend: TritonMlaBackend, forward_batch: ForwardBatch) -> object:
            _ = len(forward_batch.seq_lens_cpu) if forward_batch.kind == DRAFT else None
            return plan(backend, forward_batch)

        with mock.patch.object(TritonMlaBackend, "plan_decode", reads_the_host):
            engine = self.engine(3, cuda_graph_bs=[4])
            graphs = engine.runner.describe()["graphs"]
            kinds = ["verify", EXTEND, GREEDY_ACCEPT, SAMPLED_ACCEPT]
            self.assertEqual([kind for kind, told in graphs.items() if told["captured"]], kinds)
            for name in (GREEDY, SAMPLED):
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
        # A sampled id depends little on its position, so this checks the greedy chain.
        chain = drafts.chains[GREEDY]
        idle = ("aten.where.Scalar", "aten.clamp.default", "aten.eq.Scalar")  # ids are right, and nothing is a fault
        no_call_left_out(self, chain, partial(drafts.prove, chain, partial(drafts.chain_body, True)), 15, idle)
        accept = engine.worker.speculator.graphs
        graphs = accept.kinds[GREEDY_ACCEPT]
        no_call_left_out(self, graphs, partial(accept.prove, graphs, partial(accept.body, True)), 1, idle)


if __name__ == "__main__":
    unittest.main()
