"""How runners are made: what a rank needs is counted once per launch, and several models share one memory."""

from __future__ import annotations

import sys
import unittest
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.arg_groups.plan import evaluate, plan_launch
from sglang.srt.configs.cache_layout import FULL, STATE
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers import process_launch
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.pool_plan import PoolPlanError
from sglang.srt.model_executor import memory_plan, runner_build
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import cuda, override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

GB = 10**9
NAMES = ("deepseek-v3-tiny", "qwen3.5-moe-tiny")


def resolved(name: str, **flags: Any) -> tuple[ServerArgs, ModelConfig]:
    plan = evaluate(ServerArgs(model_path=str(EMBEDDED_MODELS[name]), random_seed=1, **flags))
    assert not plan.errors and plan.model_config is not None, plan.errors
    return plan.args, plan.model_config


class TestNeeds(CustomTestCase):
    def test_a_launch_counts_once_and_tells_the_ranks(self) -> None:
        args = ServerArgs(model_path=str(EMBEDDED_MODELS[NAMES[0]]), tp_size=2, moe_a2a_backend="mori")
        built = mock.patch.object(memory_plan, "build_rank", wraps=memory_plan.build_rank)
        with override_platform(RocmOverFakesPlatform(("mori",))), built as build_rank:
            plan = plan_launch(args)
        self.assertEqual((plan.errors, build_rank.call_count), ([], 1))
        self.assertGreater(min(plan.needed["routed experts"], plan.needed["MoE exchange"]), 0)
        told = []

        def start(name: str, module: str, config: Any, *rest: Any) -> mock.Mock:
            told.append(config.needed)
            return mock.MagicMock()

        with mock.patch.object(process_launch, "_start", start):
            with mock.patch.object(process_launch, "_wait_ready", lambda child, engine: {}):
                ipc = IpcNames.create()
                process_launch.launch_engine_processes(plan.args, ipc, {}, plan.needed)
                ipc.remove()
        self.assertEqual(told, [plan.needed, plan.needed, {}])

    def test_a_cpu_without_an_exchange_counts_nothing(self) -> None:
        with mock.patch.object(memory_plan, "build_rank", side_effect=AssertionError):
            self.assertEqual(plan_launch(ServerArgs(model_path=str(EMBEDDED_MODELS[NAMES[0]]))).needed, {})

    def test_a_rank_that_is_told_builds_nothing_to_check(self) -> None:
        args, config = resolved(NAMES[0])
        device = mock.Mock(memory_info=lambda rank: (1000, 1000), device=lambda rank: torch.device("cuda"))
        with mock.patch.object(runner_build, "current_platform", device):
            with mock.patch.object(memory_plan, "build_rank", side_effect=AssertionError("built")):
                with self.assertRaisesRegex(PoolPlanError, "before any KV"):
                    runner_build.load(args, config, {"norms": 1000})
                with self.assertRaisesRegex(AssertionError, "built"):
                    runner_build.load(args, config)

    def test_counting_needs_no_compiler_of_torch(self) -> None:
        """Its import takes seconds and 150 MB, in the HTTP process."""
        for name in NAMES:
            args, config = resolved(name)
            with mock.patch.dict(sys.modules, {"torch.fx.experimental.symbolic_shapes": None}):
                self.assertGreater(sum(memory_plan.count_weights(*memory_plan.build_rank(args, config, 0)).values()), 0)


class CachingDevice:
    """Memory of a GPU under torch's allocator, which keeps what was freed until it is told to give it back."""

    def __init__(self, free: int, cached: int) -> None:
        self.free, self.cached = free, cached

    def empty_cache(self) -> None:
        self.free, self.cached = self.free + self.cached, 0

    def capture(self, *args: Any) -> None:
        """As ``torch.cuda.graph``: it empties the cache, and what it records stays with the graph."""
        self.cached += 1 * GB  # the eager runs before it
        self.free -= 1 * GB
        self.empty_cache()
        self.free -= 3 * GB
        self.free, self.cached = self.free - 2 * GB, self.cached + 2 * GB  # those of the next bucket


class TestMemoryOfGraphs(CustomTestCase):
    def test_what_graphs_took_is_told_whatever_the_allocator_kept(self) -> None:
        device, runner = CachingDevice(40 * GB, 5 * GB), mock.MagicMock()
        fake = mock.Mock(empty_cache=device.empty_cache, mem_get_info=lambda rank: (device.free, 80 * GB))
        self.enterContext(mock.patch.object(cuda.torch, "cuda", fake))
        self.enterContext(mock.patch.object(runner_build, "current_platform", cuda.CudaPlatform()))
        graphs = self.enterContext(mock.patch.object(runner_build, "StepGraphs"))
        graphs.return_value.configure_mock(capture=device.capture, name="decode", buckets=[1, 8])
        with self.assertLogs(runner_build.logger, "INFO") as logs:
            runner_build.capture_graphs(runner, [1, 8])
        self.assertIn("decode graphs [1, 8] took 3.00 GB", logs.output[-1])

    def test_pools_get_what_the_allocator_kept(self) -> None:
        device = CachingDevice(40 * GB, 5 * GB)
        fake = mock.Mock(empty_cache=device.empty_cache, mem_get_info=lambda rank: (device.free, 80 * GB))
        with mock.patch.object(cuda.torch, "cuda", fake):
            self.assertEqual(cuda.CudaPlatform().memory_info(0), (45 * GB, 80 * GB))


class TestSeveralModels(CustomTestCase):
    """A softmax model and one with recurrent layers, in one plan, over one request table and one allocator."""

    def setUp(self) -> None:
        torch.set_num_threads(1)

    def test_they_share_a_budget_and_give_the_tokens_that_each_gives_alone(self) -> None:
        args, _ = resolved(NAMES[0], max_running_requests=2, max_total_tokens=128, page_size=1)
        configs = [resolved(name)[1] for name in NAMES]
        prompts = [list(b"12+30="), list(b"9+5=")]
        with override_server_args(**vars(args)):
            alone = [tokens([runner_build.make_runner(args, config)], prompts)[0] for config in configs]
            models = [runner_build.load(args, config) for config in configs]
            runners = runner_build.build(args, models, runner_build.plan(args, models))
            self.assertEqual(tokens(runners, prompts), alone)
            self.assertNotEqual(*alone)
        self.assertIs(runners[0].req_to_token_pool, runners[1].req_to_token_pool)
        self.assertIs(runners[0].memory, runners[1].memory)
        self.assertEqual([runner.pools.size() for runner in runners], [128, 128])
        self.assertEqual([runner.pools.size(STATE) > 0 for runner in runners], [False, True])

    def test_one_budget_is_what_both_need(self) -> None:
        args, _ = resolved(NAMES[0], max_running_requests=2)
        configs = [resolved(name)[1] for name in NAMES]
        both = runner_build.plan_pools(args, configs, 1, 8 << 20)
        pools = [runner_build.make_pools(args, config, both, 1, torch.device("meta")) for config in configs]
        table = runner_build.make_rank_memory(args, configs, both, pools, torch.device("cpu")).req_to_token_pool
        taken = sum(buffer.nbytes for each in pools for buffer in each.buffers()) + table.req_to_token.nbytes
        row = sum(buffer[:, :1].nbytes for each in pools for buffer in each.buffers(FULL))
        self.assertTrue((8 << 20) - row < taken <= 8 << 20, (taken, both))


def tokens(runners: Sequence[ModelRunner], prompts: list[list[int]]) -> list[list[list[int]]]:
    """Six greedy tokens after each prompt, by runner: in each step every runner computes its own, in the same slots."""
    memory, count = runners[0].memory, len(prompts)
    table, allocator = memory.req_to_token_pool, TokenToKVPoolAllocator(runners[0].pools.size(), memory.page_size)
    rows = [table.alloc() for _ in prompts]
    states = None if memory.state_slots is None else [memory.state_slots.alloc() for _ in prompts]
    info = SamplingBatchInfo.from_rows(
        [SamplingRow(SamplingParams(temperature=0.0), 0, (), ())] * count, runners[0].model_config.vocab_size, "cpu"
    )
    starts, ends = [0] * count, [len(prompt) for prompt in prompts]
    slots = allocator.alloc_extend(starts, ends, [-1] * count)
    table.write_extend(rows, starts, ends, slots)
    batch = ModelWorkerBatch.extend(rows, starts, ends, torch.tensor(sum(prompts, [])), slots, states)
    drawn = [[runner.sample(runner.forward(batch), info, batch)] for runner in runners]
    for _ in range(5):
        starts, ends = ends, [end + 1 for end in ends]
        slots = allocator.alloc_decode(ends, [-1] * count)
        table.write_decode(rows, starts, slots)
        batch = ModelWorkerBatch.uniform(DECODE, rows, ends, slots, states)
        for runner, ids in zip(runners, drawn, strict=True):
            memory.last_token[rows] = ids[-1].to(torch.int64)
            ids.append(runner.sample(runner.forward(batch), info, batch))
    return [torch.stack(ids, dim=1).tolist() for ids in drawn]


if __name__ == "__main__":
    unittest.main()
