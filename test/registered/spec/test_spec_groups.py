"""Speculation over attention groups and spread experts gives the tokens of one rank without it, whoever is idle."""

from __future__ import annotations

import unittest
from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.registry import fresh_decisions
from sglang.srt.environ import envs
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.draft_graphs import DRAWN, EXTEND, GREEDY
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.group_ranks import SPEC, Asked, RankEngine
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

use_fakes()
register_cpu_ci(est_time=40, suite="stage-b-test-cpu")

COLD, WARM = {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}
PENALISED = {"temperature": 0.0, "frequency_penalty": 0.6}
MORI = {"moe_a2a_backend": "mori"}
RUN = BucketGraphs.run


class Groups(CustomTestCase):
    """What two groups are asked, and what one rank answers to all of it without speculation.

    Group 1 comes later, so it is idle first, prefills while group 0 verifies, and goes on when group 0 is idle. It has
    fewer requests. One of its requests draws from other logits than the model's.
    """

    folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
    asked: list[dict[str, Asked]]

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        tokenizer = Tokenizer.from_path(cls.folder)
        prompts = [tokenizer.encode(question.text) for question in heldout_questions()[:7]]
        cls.asked = [{}, {}]
        kinds = (COLD, WARM, COLD, WARM, COLD, PENALISED, WARM)
        for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
            late = number >= 4
            params = {**kind, "max_new_tokens": 9 + number, "ignore_eos": True, "sampling_seed": number}
            cls.asked[late][f"r{number}"] = (prompt, params, (0, 0, 0, 2, 4, 14, 14)[number])
        plain = EngineHarness(cls.folder, max_total_tokens=2048, random_seed=1, dtype="float32")
        for rid, (prompt, params, _) in (cls.asked[0] | cls.asked[1]).items():
            plain.submit(rid, prompt, SamplingParams(**params))
        cls.wanted = {rid: result.output_ids for rid, result in plain.run().items()}

    def serve(self, rank: int, world: int = 2, groups: int = 2, num_steps: int = 3, **settings: Any) -> RankEngine:
        """The requests on one rank; AssertionError where a token differs or nothing was accepted, rejected or idle."""
        options = {"overlap": True, "chunked_prefill_size": 8 * groups, "speculative_num_steps": num_steps, **SPEC}
        one = RankEngine(rank, world, groups, self.folder, **{**options, **settings})
        asked = self.asked if groups > 1 else [self.asked[0] | self.asked[1]]
        found, metrics = one.serve(asked), one.engine.scheduler.metrics
        wanted = {rid: self.wanted[rid] for rid in asked[one.group]}
        assert found == wanted, (rank, found, wanted)
        assert 0 < metrics.num_accepted_drafts < metrics.num_drafts
        assert (metrics.num_idle_steps > 0) == (groups > 1), (rank, metrics.num_idle_steps)
        return one


class TestEagerGroups(Groups):
    def test_gathered_rows(self) -> None:
        for num_steps, overlap in ((1, True), (3, False), (3, True)):
            with self.subTest(num_steps=num_steps, overlap=overlap):
                run_processes(2, partial(self.serve, num_steps=num_steps, overlap=overlap))

    def test_groups_of_two_ranks(self) -> None:
        run_processes(4, partial(self.serve, world=4))

    def test_exchanged_rows(self) -> None:
        for groups, mode, cap in ((1, "normal", 0), (2, "normal", 0), (2, "low_latency", 6)):
            with self.subTest(groups=groups, mode=mode, cap=cap):
                with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
                    run_processes(2, partial(self.serve, groups=groups, deepep_mode=mode, **MORI))


class TestGroupsWithStates(Groups):
    """Of Qwen3.5."""

    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])

    def test_gathered_and_exchanged_rows(self) -> None:
        run_processes(2, self.serve)
        run_processes(2, partial(self.serve, **MORI))


class TestCapturedGroups(Groups):
    """Over the fakes of HIP, whose graphs repeat the recorded calls."""

    def replay(self, rank: int, **settings: Any) -> None:
        counts: Counter[str] = Counter()

        def run(graphs: BucketGraphs[Any], bucket: int) -> Any:
            counts[graphs.name] += serving
            return RUN(graphs, bucket)

        serving = False
        with mock.patch.object(BucketGraphs, "run", run):
            sizes = {"attention_backend": "triton", "cuda_graph_bs": [2, 4], "max_running_requests": 4}
            serve = RankEngine.serve

            def counted(one: RankEngine, asked: Any) -> dict[str, list[int]]:
                nonlocal serving
                serving = True
                return serve(one, asked)

            with mock.patch.object(RankEngine, "serve", counted):
                one = self.serve(rank, **sizes, **settings)
        graphs = one.engine.runner.describe()["graphs"]
        assert all(told["captured"] == [2, 4] and not told["refused"] for told in graphs.values()), graphs
        # Chains of a step in which somebody's logits are edited are eager on all ranks.
        chains = counts[GREEDY] + counts[DRAWN]
        assert counts["verify"] == counts[EXTEND] > chains > 0, counts
        print(rank, counts, one.engine.scheduler.metrics.num_idle_steps)

    def test_same_tokens(self) -> None:
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            for settings in ({}, MORI):
                with self.subTest(**settings):
                    run_processes(2, partial(self.replay, **settings))


if __name__ == "__main__":
    unittest.main()
