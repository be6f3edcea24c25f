"""Buckets, padding and the replay check of decode graphs, with a graph that "replays" by running the step again."""

from __future__ import annotations

import functools
import gc
import tempfile
import unittest
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.dp_sync import agree
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.written_rows import fingerprint
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.capture_lint import CaptureViolation
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.graph_check import GraphCheck
from sglang.srt.model_executor.model_pools import RankMemory
from sglang.srt.model_executor.runner_build import prove_graphs
from sglang.srt.model_executor.step_graphs import StepBuffers, StepGraphs, decode_buckets
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.host_device import HostGraph
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.cache_pools import kv_pools, latent_pools
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

use_fakes()
register_cpu_ci(est_time=35, suite="stage-b-test-cpu")

CPU = torch.device("cpu")
REPLAY = HostGraph.replay
PARAMS = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)


class RerunGraph:
    """Captures by remembering the body; a replay runs it again into the tensors of the first run."""

    spoil: Callable[[Any], None] | None = None

    def capture(self, body: Callable[[], Any]) -> Any:
        self._body = body
        self._output = body()
        return self._output

    def replay(self) -> None:
        self._output.next_token_logits.copy_(self._body().next_token_logits)
        if RerunGraph.spoil is not None:
            RerunGraph.spoil(self._output)


def hook(backend: Any) -> None:
    """Give the CPU backend the hooks that capture needs; each step is planned again, the captured one too."""
    captured: dict[int, ForwardBatch] = {}

    def init_forward_metadata_capture(forward_batch: ForwardBatch) -> None:
        forward_batch.seq_lens_cpu = forward_batch.seq_lens.tolist()
        backend.init_forward_metadata(forward_batch)
        captured[forward_batch.batch_size] = forward_batch

    def init_forward_metadata_replay(forward_batch: ForwardBatch) -> None:
        assert forward_batch.seq_lens_cpu == forward_batch.seq_lens.tolist()
        backend.init_forward_metadata(forward_batch)
        captured[forward_batch.batch_size].attn_plan = forward_batch.attn_plan

    backend.init_cuda_graph_state = lambda max_bs, max_context_len: None
    backend.init_forward_metadata_capture = init_forward_metadata_capture
    backend.init_forward_metadata_replay = init_forward_metadata_replay


class TestDecodeGraphs(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.models = {name: f"{folder}/{name}" for name in ("dsv3", "q35moe-ns")}
        for name, path in cls.models.items():
            save_tiny_checkpoint(name, path)

    def tearDown(self) -> None:
        RerunGraph.spoil = None

    def engine(self, name: str, page_size: int) -> tuple[EngineHarness, StepGraphs]:
        engine = EngineHarness(
            self.models[name], max_total_tokens=2048, max_running_requests=8, page_size=page_size, random_seed=1
        )
        hook(engine.runner.attn_backend)
        return engine, self.captured(engine)

    @torch.inference_mode()
    def captured(self, engine: EngineHarness) -> StepGraphs:
        runner = engine.runner
        graphs = StepGraphs(
            kind=DECODE,
            forward=runner.run_planned,
            backend=runner.attn_backend,
            buckets=[1, 2, 4, 8],
            max_context_len=2048,
            device=runner.device,
            padding_row=runner.req_to_token_pool.padding_row,
            has_state=runner.has_state,
        )
        graphs.capture(RerunGraph)
        prove_graphs(runner, graphs)
        return graphs

    def tokens(self, engine: EngineHarness) -> dict[str, list[int]]:
        for number in range(7):
            engine.submit(f"r{number}", list(range(5, 12 + 9 * number)), PARAMS)
        return {rid: result.output_ids for rid, result in engine.run().items()}

    def test_replay_gives_the_tokens_of_eager(self) -> None:
        for name, page_size in (("dsv3", 1), ("dsv3", 16), ("q35moe-ns", 1)):
            with self.subTest(model=name, page_size=page_size):
                engine, graphs = self.engine(name, page_size)
                self.assertEqual(graphs.refused, {})
                wanted = self.tokens(engine)
                replayed, graphs = self.engine(name, page_size)
                replayed.runner.decode_graphs = graphs
                with mock.patch.object(graphs, "replay", wraps=graphs.replay) as replay:
                    self.assertEqual(self.tokens(replayed), wanted)
                self.assertIn(8, [call.args[1] for call in replay.call_args_list])

    def test_decode_steps_write_the_table_of_the_device(self) -> None:
        """With a table of the device's own, as on a GPU: what the host wrote for decode steps is not in it."""
        for name in self.models:
            wanted = self.tokens(self.engine(name, 1)[0])
            engine, _ = self.engine(name, 1)
            pool, backend = engine.runner.req_to_token_pool, engine.runner.attn_backend
            pool.req_to_token = pool.req_to_token.clone()
            getattr(backend, "full_attn_backend", backend).req_to_token = pool.req_to_token
            pool.device, pool._copied = torch.device("meta"), torch.from_numpy
            self.assertEqual(self.tokens(engine), wanted)

    def test_pools_are_empty_after_the_proof(self) -> None:
        engine, _ = self.engine("q35moe-ns", 1)
        for buffer in engine.runner.pools.buffers():
            self.assertFalse(bool(buffer.any()))
        engine.memory.check_idle(deep=True)

    def test_a_graph_that_differs_is_refused_by_bucket(self) -> None:
        def one_bit(output: Any) -> None:
            if output.next_token_logits.shape[0] == 4:
                output.next_token_logits[0, 0] += 1e-6 + output.next_token_logits[0, 0].abs() * 1e-6

        RerunGraph.spoil = one_bit
        _, graphs = self.engine("dsv3", 1)
        self.assertEqual(list(graphs.refused), [4])
        self.assertIn("differ", graphs.refused[4])

    def test_a_graph_that_writes_elsewhere_is_refused(self) -> None:
        engine, _ = self.engine("dsv3", 1)
        pool = engine.runner.pools.buffers()[0]
        RerunGraph.spoil = lambda output: pool[0, 40].add_(1.0)
        graphs = self.captured(engine)
        self.assertEqual(sorted(graphs.refused), [1, 2, 4, 8])
        self.assertIn("wrote", graphs.refused[1])

    def test_the_proof_keeps_to_small_pools_and_contexts(self) -> None:
        def check(num_slots: int) -> GraphCheck:
            graphs = SimpleNamespace(buckets=[8])
            pool = ReqToTokenPool(8, 40 + 1)  # a context of 40 tokens, and the column past it
            pools = kv_pools(num_slots, 1, torch.float32, 1, 1, [0])
            memory = RankMemory(None, 1, pool, torch.zeros(9, dtype=torch.int64), None)
            return GraphCheck(graphs, DECODE, mock.Mock(), mock.Mock(), memory, pools, 9)

        self.assertIn("pools have 3 slots", check(3)._check(8))
        roomy = check(1000)
        rows = [roomy._req_pool.alloc() for _ in range(5)]
        self.assertEqual(max(roomy._batch(rows, 8, torch.Generator()).seq_lens), 40)

    def test_buckets(self) -> None:
        self.assertEqual(decode_buckets(3), [1, 2, 3])
        self.assertEqual(decode_buckets(20), [1, 2, 4, 8, 16, 20])
        self.assertEqual(decode_buckets(160)[-3:], [112, 128, 160])
        self.assertEqual(decode_buckets(16, [4, 99, 1]), [1, 4])
        with self.assertRaises(ValueError):
            decode_buckets(4, [8])

    def test_fingerprint_sees_one_bit(self) -> None:
        tensor = torch.randn(2, 9, 5)
        before = fingerprint(tensor, 1)
        tensor[1, 6, 2] = torch.nextafter(tensor[1, 6, 2], torch.tensor(9.0))
        changed = (before != fingerprint(tensor, 1)).nonzero().flatten().tolist()
        self.assertEqual(changed, [5])
        tensor[:, 0] = 7.0
        self.assertEqual((before != fingerprint(tensor, 1)).sum().item(), 1)


class TestOverFakes(CustomTestCase):
    """HIP's policy on a CPU: the backend of GPUs, whose graphs are recorded and repeat the same storages."""

    def engine(self, model: str, **settings: Any) -> EngineHarness:
        settings = {"attention_backend": "triton", "cuda_graph_bs": [1, 2, 8], "random_seed": 1, **settings}
        settings.setdefault("disable_piecewise_cuda_graph", True)
        return EngineHarness(model, max_total_tokens=1024, max_running_requests=8, **settings)

    def check(self, model: str, streams: int, **settings: Any) -> None:
        """Graphs of every bucket pass the check and give the tokens of eager steps; it has ``streams`` side streams."""
        tokens = TestDecodeGraphs.tokens
        wanted = tokens(self, self.engine(model, disable_cuda_graph=True, **settings))
        platform = RocmOverFakesPlatform(find_fakes())
        with override_platform(platform), mock.patch.object(HostGraph, "replay", autospec=True) as replay:
            replay.side_effect = REPLAY
            engine = self.engine(model, **settings)
            self.assertEqual(platform.create_stream().name, f"side{streams + 1}")
            graphs = engine.runner.decode_graphs
            assert graphs is not None
            self.assertEqual((graphs.refused, sorted(graphs._steps)), ({}, [1, 2, 8]))
            proofs = replay.call_count
            self.assertEqual(tokens(self, engine), wanted)
            self.assertGreater(replay.call_count, proofs)

    def test_replay_gives_the_tokens_of_eager(self) -> None:
        variables = {"SGLANG_ALT_STREAM": "1", "SGLANG_GDN_QKVZ_BA_ALT_STREAM": "1", "SGLANG_QK_NORM_ALT_STREAM": "1"}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("dsv3", "q35moe-ns"):
                save_tiny_checkpoint(name, f"{folder}/{name}")
            for name, streams, environ in (
                ("dsv3", 0, {}),
                ("dsv3", 1, {"SGLANG_ROCM_USE_MULTI_STREAM": "1"}),
                ("q35moe-ns", 1, variables),
                ("q35moe-ns", 0, {"SGLANG_USE_AITER": "1"}),
            ):
                settings = {"disable_shared_experts_fusion": bool(streams)}
                settings |= {"dtype": "bfloat16"} if "SGLANG_USE_AITER" in environ else {}
                environ = {**environ, "GPU_MAX_HW_QUEUES": "8"}
                with self.subTest(name, environ=environ), mock.patch.dict("os.environ", environ), fresh_decisions():
                    with override_platform(RocmOverFakesPlatform(find_fakes())):
                        self.check(f"{folder}/{name}", streams, **settings)

    @torch.inference_mode()
    def test_a_replay_that_leaves_one_call_out_is_refused(self) -> None:
        platform = override_platform(RocmOverFakesPlatform(find_fakes()))
        with tempfile.TemporaryDirectory() as folder, platform, fresh_decisions():
            save_tiny_checkpoint("q35moe-ns", folder)
            engine = self.engine(folder, cuda_graph_bs=[2])
            graphs = engine.runner.decode_graphs
            assert graphs is not None
            calls = graphs._steps[2].graph._calls
            for index in range(0, len(calls), len(calls) // 8):
                graphs.refused.clear()
                step, left_out = graphs._steps[2], calls.pop(index)
                for result in left_out.results:  # which hold what the proof of the last turn left
                    _ = None if result is None else result.zero_()
                prove_graphs(engine.runner, graphs)
                self.assertIn(2, graphs.refused, left_out.name)
                graphs._steps[2] = step
                calls.insert(index, left_out)


class TestKindsOfStep(CustomTestCase):
    """Steps of several tokens per request use the same buffers, and the same check."""

    VERIFY = StepKind("verify", 3)

    def test_rows_and_padding(self) -> None:
        buffers = StepBuffers(self.VERIFY, 4, CPU, padding_row=9)
        buffers.packed.fill_(77)
        batch = ModelWorkerBatch.uniform(self.VERIFY, [5, 2], [8, 3], torch.arange(10, 16), [1, 4])
        self.assertEqual(batch.positions.tolist(), [5, 6, 7, 0, 1, 2])
        buffers.fill(batch, 3)
        forward_batch = buffers.view(3, mock.Mock(), True, batch)
        self.assertEqual(forward_batch.positions.tolist(), [5, 6, 7, 0, 1, 2, 0, 1, 2])
        self.assertEqual(forward_batch.out_cache_loc.tolist(), [10, 11, 12, 13, 14, 15, 0, 0, 0])
        self.assertEqual(
            (forward_batch.req_pool_indices.tolist(), forward_batch.state_slot_ids.tolist()), ([5, 2, 9], [1, 4, 0])
        )
        self.assertEqual((forward_batch.seq_lens.tolist(), forward_batch.seq_lens_cpu), ([8, 3, 3], [8, 3, 3]))
        self.assertEqual((int(forward_batch.num_token_non_padded), forward_batch.num_token_non_padded_cpu), (6, 6))

    def test_the_proof_compares_every_row_and_every_output(self) -> None:
        """A step that writes its cache rows and reads those before them, with hidden rows next to the logits."""
        pools, factors = latent_pools(599, 1, torch.float32, 2, [0]), torch.tensor([1.0, 2.0])
        (pool,) = pools.buffers()
        requests, last = ReqToTokenPool(8, 200), torch.zeros(9, dtype=torch.int64)

        def forward(forward_batch: ForwardBatch) -> LogitsProcessorOutput:
            pool[0, forward_batch.out_cache_loc] = forward_batch.positions.float().unsqueeze(1) * factors
            rows = forward_batch.req_pool_indices.repeat_interleave(3)
            hidden = pool[0, forward_batch.out_cache_loc] + pool[0, requests.req_to_token[rows, 0].long()]
            return LogitsProcessorOutput(hidden * 3, hidden_states=hidden)

        def check(spoilt: int | None) -> dict[int, str]:
            class SpoiltGraph(RerunGraph):
                def replay(self) -> None:
                    for ours, theirs in zip(self._output.tensors(), self._body().tensors(), strict=True):
                        ours.copy_(theirs)
                    if spoilt is not None:
                        self._output.hidden_states[spoilt] += 1

            def eager(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
                return forward(graphs.fill(batch, bucket)).first(3 * batch.batch_size).tensors()

            def replay(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
                return graphs.replay(batch, bucket)[1].tensors()

            graphs = StepGraphs(self.VERIFY, forward, mock.MagicMock(), [4], 100, CPU, requests.padding_row, False)
            with torch.inference_mode():
                graphs.capture(SpoiltGraph)
                GraphCheck(
                    graphs, self.VERIFY, eager, replay, RankMemory(None, 1, requests, last, None), pools, 9
                ).run()
            return graphs.refused

        self.assertEqual(check(None), {})
        for row in (0, 8):
            self.assertIn("differ", check(row)[4])


class TestAttentionGroups(CustomTestCase):
    def test_a_group_without_rows_replays_padding(self) -> None:
        buffers = StepBuffers(DECODE, 4, torch.device("cpu"), padding_row=9, num_groups=2)
        buffers.packed.fill_(77)
        batch = agree([(3, 3, 4, 0, 1, 0), (0, 0, 0, 0, 0, 0)], 1).of_batch(ModelWorkerBatch.idle(DECODE))
        buffers.fill(batch, 4)
        forward_batch = buffers.view(4, None, True, batch)
        self.assertEqual((int(forward_batch.num_token_non_padded), forward_batch.num_token_non_padded_cpu), (0, 0))
        self.assertEqual(
            (forward_batch.req_pool_indices.tolist(), forward_batch.out_cache_loc.tolist()), ([9] * 4, [0] * 4)
        )
        self.assertEqual((forward_batch.seq_lens.tolist(), forward_batch.seq_lens_cpu), ([1] * 4, [1] * 4))
        self.assertEqual((forward_batch.global_num_tokens_cpu, forward_batch.global_num_rows_cpu), ([3, 0], [4, 4]))
        self.assertTrue(forward_batch.forward_mode.is_decode())


class TestRanks(CustomTestCase):
    """Two ranks, as threads that meet in the collectives of each step."""

    def capture(self, offends: Callable[[int, ForwardBatch], None], fails: tuple[int, ...] = ()) -> list[StepGraphs]:
        """Each rank's graphs of 1, 2 and 4 rows; ``fails``: buckets whose capture raises on rank 1."""
        ranks = thread_ranks(2)

        def forward(rank: int, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
            offends(rank, forward_batch)
            rows = forward_batch.positions.unsqueeze(1).float()
            return LogitsProcessorOutput(ranks[rank].all_reduce(rows))

        def capture(rank: int) -> StepGraphs:
            own = functools.partial(forward, rank)
            graphs = StepGraphs(DECODE, own, mock.MagicMock(), [1, 2, 4], 8, CPU, 0, False, world=ranks[rank])

            class FailingGraph(RerunGraph):
                def capture(self, body: Callable[[], Any]) -> Any:
                    rows = super().capture(body)
                    if rank == 1 and rows.next_token_logits.shape[0] in fails:
                        raise CaptureViolation("planted") if 2 in fails else MemoryError("planted")
                    return rows

            with torch.inference_mode():
                graphs.capture(FailingGraph)
            return graphs

        with self.assertLogs("sglang.srt.model_executor.bucket_graphs", "INFO") as logs:
            try:
                return run_ranks(capture, range(2))
            finally:
                self.said = "\n".join(logs.output)

    def check_refused(self, found: list[StepGraphs], bucket: int, words: str) -> None:
        for rank, graphs in enumerate(found):
            self.assertEqual(list(graphs.refused), [bucket])
            self.assertIn(words, graphs.refused[bucket])
            self.assertEqual("rank 1 refuses it" in graphs.refused[bucket], rank == 0)
            self.assertEqual([graphs.bucket_of(rows) is None for rows in (1, 2, 4)], [bucket == b for b in (1, 2, 4)])

    def test_a_step_that_one_rank_cannot_capture_is_refused_by_both(self) -> None:
        def reads_device(rank: int, forward_batch: ForwardBatch) -> None:
            if rank == 1 and forward_batch.batch_size == 4:
                forward_batch.seq_lens.max().item()

        def reads_host(rank: int, forward_batch: ForwardBatch) -> None:
            if rank == 1 and forward_batch.batch_size == 1:
                sum(forward_batch.seq_lens_cpu)

        self.check_refused(self.capture(reads_device), 4, "_local_scalar_dense")
        self.check_refused(self.capture(reads_host), 1, "host-side list")

    def test_a_capture_that_one_rank_refuses_is_refused_by_both(self) -> None:
        self.check_refused(self.capture(lambda rank, forward_batch: None, fails=(2,)), 2, "planted")

    def test_a_capture_that_breaks_is_told_to_the_others_before_it_raises(self) -> None:
        def leave(rank: int, forward_batch: ForwardBatch) -> None:
            if rank == 0 and forward_batch.batch_size == 2:
                raise InterruptedError("rank 1 has gone")

        with self.assertRaises((MemoryError, InterruptedError)):
            self.capture(leave, fails=(4,))
        self.assertIn("batch size 4 is refused: rank 1 refuses it: MemoryError: planted", self.said)

    def test_a_proof_that_fails_on_one_rank_is_refused_by_both(self) -> None:
        found = self.capture(lambda rank, forward_batch: None)
        kept = run_ranks(lambda rank: found[rank].agree(2, "logits differ" if rank else ""), range(2))
        self.assertEqual(kept, [False, False])
        self.check_refused(found, 2, "logits differ")


class TestWhatAGraphReads(CustomTestCase):
    def test_tensors_of_a_captured_body_live_as_long_as_its_graph(self) -> None:
        """A device graph holds addresses only: memory that others got since gave a replay their numbers."""
        held: list[weakref.ref[torch.Tensor]] = []

        def body_of(bucket: int) -> Callable[[], Any]:
            zero = torch.zeros(())
            held.append(weakref.ref(zero))
            return lambda: SimpleNamespace(tensors=lambda: (), given=zero + bucket)

        graphs: BucketGraphs[Any] = BucketGraphs("step", [1, 2], CPU)
        graphs.capture_all(body_of, lambda: SimpleNamespace(capture=lambda body: body() and None, replay=lambda: None))
        self.assertEqual((graphs.captured, len(held)), ([1, 2], 2))
        gc.collect()
        self.assertTrue(all(each() is not None for each in held))


if __name__ == "__main__":
    unittest.main()
