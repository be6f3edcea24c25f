"""Speculation over attention groups and spread experts gives the tokens of one rank without it, whoever is idle."""

from __future__ import annotations

import unittest
from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import torch

from sglang.kernels.registry import fresh_decisions
from sglang.srt.environ import envs
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.speculative.draft_graphs import DRAWN, EXTEND, GREEDY
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.group_ranks import RankEngine, TwoGroups, refuse_draft_extend
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=35, suite="stage-b-test-cpu")

MORI = {"moe_a2a_backend": "mori"}
GRAPHS = {"attention_backend": "triton", "cuda_graph_bs": [2, 4], "max_running_requests": 4}
RUN = BucketGraphs.run


class Groups(CustomTestCase):
    model = "deepseek-v3-tiny"

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.two = TwoGroups(cls.model)


class TestEagerGroups(Groups):
    def test_gathered_rows(self) -> None:
        for num_steps, overlap in ((1, True), (3, False), (3, True)):
            with self.subTest(num_steps=num_steps, overlap=overlap):
                run_processes(2, partial(self.two.serve, num_steps=num_steps, overlap=overlap))

    def test_groups_of_two_ranks(self) -> None:
        run_processes(4, partial(self.two.serve, world=4))

    def test_exchanged_rows(self) -> None:
        for groups, mode, cap in ((1, "normal", 0), (2, "normal", 0), (2, "low_latency", 6)):
            with self.subTest(groups=groups, mode=mode, cap=cap):
                with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
                    run_processes(2, partial(self.rounds, groups, cap, deepep_mode=mode))

    def rounds(self, groups: int, cap: int, rank: int, **settings: Any) -> None:
        """A verify step that exceeds the cap runs its experts in rounds, those of the drafts included."""
        one = self.two.serve(rank, groups=groups, **MORI, **settings)
        told = one.engine.runner.describe()["experts"]["received_rows"]
        assert (told["most_rounds"] > 1) == (cap > 0), told
        # Four rows of each of three requests, or more.
        assert told["suggested_cap"] >= 12, told

    def test_input_cut(self) -> None:
        with envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS.override(2):
            run_processes(2, partial(self.two.serve, **MORI))


class TestGroupsWithStates(Groups):
    """Of Qwen3.5."""

    model = "qwen3.5-moe-tiny"

    def test_gathered_and_exchanged_rows(self) -> None:
        run_processes(2, self.two.serve)
        run_processes(2, partial(self.two.serve, **MORI))


class TestCapturedGroups(Groups):
    """Over the fakes of HIP, whose graphs repeat the recorded calls."""

    def replay(self, rank: int, **settings: Any) -> None:
        counts: Counter[str] = Counter()
        serving, serve = False, RankEngine.serve

        def run(graphs: BucketGraphs[Any], bucket: int) -> Any:
            counts[graphs.name] += serving
            return RUN(graphs, bucket)

        def counted(one: RankEngine, asked: Any) -> dict[str, list[int]]:
            nonlocal serving
            serving = True
            return serve(one, asked)

        with mock.patch.object(BucketGraphs, "run", run), mock.patch.object(RankEngine, "serve", counted):
            one = self.two.serve(rank, **GRAPHS, **settings)
        graphs = one.engine.runner.describe()["graphs"]
        assert all(told["captured"] == [2, 4] and not told["refused"] for told in graphs.values()), graphs
        # Chains of a step in which somebody's logits are edited are eager on all ranks.
        assert counts["verify"] == counts[EXTEND] > counts[GREEDY] + counts[DRAWN] > 0, counts

    def test_a_refused_kind_runs_eagerly_on_all_ranks(self) -> None:
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            run_processes(2, partial(self.two.serve, prepare=refuse_draft_extend, **MORI, **GRAPHS))

    def test_same_tokens(self) -> None:
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            for settings in ({}, MORI):
                with self.subTest(**settings):
                    run_processes(2, partial(self.replay, **settings))


if __name__ == "__main__":
    unittest.main()
