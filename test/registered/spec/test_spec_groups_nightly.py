"""Speculation over groups in more shapes: four ranks, states, a cut by hand, every kind of step over MORI's fake."""

from __future__ import annotations

import tempfile
import unittest
from functools import partial
from unittest import mock

import torch

from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.environ import envs
from sglang.srt.layers.moe.token_dispatcher import moriep
from sglang.srt.layers.moe.token_dispatcher.base import EpConfig, EpTransport
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.group_ranks import GRAPHS, MORI, TwoGroups, err_behind_rank_zero, refuse_draft_extend
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

use_fakes()
register_cpu_ci(est_time=140, suite="nightly-cpu", nightly=True)


class TestEagerGroups(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.two = TwoGroups.of_embedded("deepseek-v3-tiny")

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
    """Groups of Qwen3.5."""

    def test_every_way(self) -> None:
        torch.set_num_threads(1)
        two = TwoGroups.of_embedded("qwen3.5-moe-tiny")
        run_processes(2, two.serve)
        run_processes(2, partial(two.serve, **MORI))
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            run_processes(2, two.replay)


class Captured(CustomTestCase):
    """Groups under HIP's policy on a CPU, with MORI's fake."""

    def setUp(self) -> None:
        torch.set_num_threads(1)
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))
        self.enterContext(fresh_decisions())

    def on_gathered_rows(self) -> None:
        """From here on rows are exchanged as on GPUs without MORI: all to all ranks, which a graph can capture."""

        def made(sizes: EpConfig, group: ProcessGroupHandle, device: torch.device, gathered: bool) -> EpTransport:
            return PortableTransport(sizes, group, device, gathered=True)

        self.enterContext(mock.patch.object(moriep, "choose_kernel", lambda config: None))
        self.enterContext(mock.patch.object(moriep, "PortableTransport", made))


class TestCapturedGroups(Captured):
    two: TwoGroups

    @classmethod
    def setUpClass(cls) -> None:
        cls.two = TwoGroups.of_embedded("deepseek-v3-tiny")

    def test_gathered_rows_in_rounds(self) -> None:
        self.on_gathered_rows()
        for cap in (0, 10):
            with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
                run_processes(2, partial(self.two.replay, **MORI))
        run_processes(2, partial(self.two.replay, groups=1, **MORI))

    def test_a_refused_kind_runs_eagerly_on_all_ranks(self) -> None:
        run_processes(2, partial(self.two.serve, prepare=refuse_draft_extend, **MORI, **GRAPHS))

    def test_exchanged_rows(self) -> None:
        for groups in (1, 2):
            run_processes(2, partial(self.two.replay, groups=groups, **MORI))


class TestDeepseekV4(Captured):
    """Random weights of so few ids that drafts of an untrained layer are accepted now and then."""

    def test_every_way(self) -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
        layers = {"num_hidden_layers": 3, "layer_types": kinds, "mlp_layer_types": ["hash_moe", "moe", "moe"]}
        save_tiny_v4_mtp(folder, vocab_size=12, **layers)
        generator = torch.Generator().manual_seed(4)
        prompts = [torch.randint(0, 12, (n,), generator=generator).tolist() for n in (1, 5, 130, 254, 300, 40, 7)]
        two = TwoGroups(folder, prompts, chunk=256, max_total_tokens=8192, context_length=1024)
        run_processes(2, two.serve)
        replay = partial(two.replay, attention_backend="compressed")
        run_processes(2, replay)
        run_processes(2, partial(replay, **MORI))
        self.on_gathered_rows()
        run_processes(2, partial(replay, **MORI))


if __name__ == "__main__":
    unittest.main()
