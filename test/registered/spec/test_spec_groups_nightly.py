"""Speculation over groups in more shapes: four ranks, states, a cut by hand, every kind of step over MORI's fake."""

from __future__ import annotations

import unittest
from functools import partial

import torch

from sglang.kernels.registry import fresh_decisions
from sglang.srt.environ import envs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.group_ranks import GRAPHS, MORI, TwoGroups, err_behind_rank_zero, refuse_draft_extend
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=90, suite="nightly-cpu", nightly=True)


class TestEagerGroups(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.two = TwoGroups("deepseek-v3-tiny")

    def test_one_draft_and_no_overlap(self) -> None:
        run_processes(2, partial(self.two.serve, num_steps=1))
        run_processes(2, partial(self.two.serve, overlap=False))

    def test_groups_of_two_ranks(self) -> None:
        run_processes(4, partial(self.two.serve, world=4, prepare=err_behind_rank_zero))
        run_processes(4, partial(self.two.serve_capped, cap=0, world=4))

    def test_exchanged_rows(self) -> None:
        for groups, mode in ((1, "low_latency"), (2, "normal")):
            run_processes(2, partial(self.two.serve_capped, cap=0, groups=groups, deepep_mode=mode))

    def test_input_cut(self) -> None:
        with envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS.override(2):
            run_processes(2, partial(self.two.serve, **MORI))


class TestGroupsWithStates(CustomTestCase):
    """Of Qwen3.5."""

    def test_every_way(self) -> None:
        torch.set_num_threads(1)
        two = TwoGroups("qwen3.5-moe-tiny")
        run_processes(2, two.serve)
        run_processes(2, partial(two.serve, **MORI))
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            run_processes(2, two.replay)


class TestCapturedGroups(CustomTestCase):
    """Over the fakes of HIP and MORI."""

    @classmethod
    def setUpClass(cls) -> None:
        TestEagerGroups.setUpClass()
        cls.two = TestEagerGroups.two

    def setUp(self) -> None:
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())

    def test_a_refused_kind_runs_eagerly_on_all_ranks(self) -> None:
        run_processes(2, partial(self.two.serve, prepare=refuse_draft_extend, **MORI, **GRAPHS))

    def test_exchanged_rows(self) -> None:
        for groups in (1, 2):
            run_processes(2, partial(self.two.replay, groups=groups, **MORI))


if __name__ == "__main__":
    unittest.main()
