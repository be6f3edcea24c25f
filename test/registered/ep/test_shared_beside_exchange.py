"""Shared experts on a second stream overlapping MORI's AsyncLL exchange, over its fake: no race, each wait needed."""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.arg_groups.stream_policy import plan_streams
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState, override_parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.factory import describe_experts
from sglang.srt.model_loader.loader import default_dtype
from sglang.srt.models.deepseek_common.moe import DeepseekV2MoE
from sglang.srt.models.qwen2_moe import Qwen2MoeSparseMoeBlock
from sglang.srt.platforms import override_platform
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.srt.utils.multi_stream_utils import StreamOverlap
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ep_world import EpModel, process_state
from sglang.test.happens_before import FakeStreamPlatform
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

CASE = unittest.TestCase()
SITES = {"deepseek-v2-tiny": "deepseek.shared_experts", "qwen3.5-moe-tiny": "qwen3_5.shared_experts"}
ASKED = {"SGLANG_ROCM_USE_MULTI_STREAM": "1", "SGLANG_ALT_STREAM": "1", "MORI_ENABLE_SDMA": "1"}
ARGS = {"moe_a2a_backend": "mori", "deepep_mode": "low_latency", "tp_size": 2, "ep_size": 2}
ROWS, REAL = [5, 3], [4, 3]


def make_blocks(name: str, overlap: StreamOverlap, state: ParallelState) -> nn.ModuleList:
    """The MoE blocks of two layers, which share one exchange, with the same weights on every call."""
    config = ModelConfig.from_path(str(EMBEDDED_MODELS[name])).text
    torch.manual_seed(state.world.rank)
    with override_server_args(**ARGS), override_parallel_state(state), default_dtype(torch.float32):
        if name == "deepseek-v2-tiny":
            blocks = nn.ModuleList(DeepseekV2MoE(config, overlap) for _ in range(2))
        else:
            blocks = nn.ModuleList(Qwen2MoeSparseMoeBlock(layer, config) for layer in range(2))
            for block in blocks:
                block.overlap = overlap
    for param in blocks.parameters():
        param.data.normal_(std=0.1)
    return blocks


def run(blocks: nn.ModuleList, state: ParallelState) -> Callable[[], torch.Tensor]:
    """A step of both layers on rows of this rank's attention group, padding included."""
    hidden, group = blocks[0].experts.hidden, state.attn_dp_rank
    model = EpModel(hidden=hidden)
    groups = state.attn_dp_size
    step = model.step(ROWS[:groups], REAL[:groups], seed=3)
    batch = step.batch_of(group)

    @torch.inference_mode()
    def body() -> torch.Tensor:
        with override_parallel_state(state):
            x = step.x[group] * 1.0
            for block in blocks:
                x = x + block(x, batch)
            return x[: step.real[group]].clone()

    return body


def check_rank(rank: int, name: str, groups: int, cap: int) -> None:
    platform = FakeStreamPlatform("hip", capturing=False, fakes=("mori",))
    state = process_state(rank, 2, groups)
    with override_platform(platform), envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(8):
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
            site = plan_streams(ServerArgs(**ARGS), "slots do not travel").site(SITES[name])
            CASE.assertTrue(site.enabled and not site.capture_only, site)
            serial = run(make_blocks(name, StreamOverlap(), state), state)()
            blocks = make_blocks(name, StreamOverlap(platform.create_stream(), site), state)
            CASE.assertRegex(describe_experts(blocks)["transport"], r"FAKE \(AsyncLL\)")
        body = run(blocks, state)
        side = blocks[0].overlap._alt_stream.name
        for main_first in (False, True):
            report = platform.observe(body, main_first=main_first)
            CASE.assertEqual([str(race) for race in report.races], [])
            CASE.assertTrue(torch.equal(report.result, serial), "the streams change the result")
            CASE.assertEqual(report.waits, [f"{side} after main", f"main after {side}"] * 2)
        for index, wait in enumerate(report.waits):
            races = platform.observe(body, leave_out=index).races
            CASE.assertTrue(races, f"nothing is found without wait {index} ({wait})")
    figures = describe_experts(blocks)["received_rows"]
    CASE.assertEqual(figures["most_rounds"] > 1, cap > 0)


class TestSharedBesideExchange(CustomTestCase):
    def test_no_race_and_each_wait_is_needed(self):
        with mock.patch.dict(os.environ, ASKED):
            for case in (("deepseek-v2-tiny", 1, 0), ("deepseek-v2-tiny", 2, 4), ("qwen3.5-moe-tiny", 2, 0)):
                with self.subTest(case):
                    run_processes(2, lambda rank: check_rank(rank, *case))  # noqa: B023

    def test_the_sides_touch_nothing_of_each_other(self):
        """The debug mode, which refuses storages and collectives that both sides touch, stays silent."""

        def work(rank: int) -> None:
            platform = FakeStreamPlatform("hip", capturing=False, fakes=("mori",))
            state = process_state(rank, 2, 2)
            with override_platform(platform):
                site = plan_streams(ServerArgs(**ARGS), "slots do not travel").site(SITES["deepseek-v2-tiny"])
                overlap = StreamOverlap(platform.create_stream(), site)
                run(make_blocks("deepseek-v2-tiny", overlap, state), state)()

        with mock.patch.dict(os.environ, {**ASKED, "SGLANG_DEBUG_STREAM_OVERLAP": "1"}):
            run_processes(2, work)


if __name__ == "__main__":
    unittest.main()
