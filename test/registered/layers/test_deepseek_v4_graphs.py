"""Captured steps of compressed attention under HIP's policy: check on scattered pages, plans in and outside graphs."""

import copy
import tempfile
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.functional import one_hot

from sglang.srt.configs.cache_layout import FULL, SWA
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import (
    DeepseekV4HipRadixBackend,
    DeepseekV4MultiStepBackend,
    per_step_draft_out_cache_loc,
)
from sglang.srt.layers.attention.deepseek_v4_planner import CompressedPlan
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.graph_check import GraphCheck
from sglang.srt.model_executor.model_pools import RankMemory, StepRelay
from sglang.srt.model_executor.model_runner import place_rows
from sglang.srt.model_executor.step_graphs import StepGraphs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.mtp_drafter import ChainStart, MtpDrafter
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import CONTEXT, CPU, VOCAB, AttentionHarness
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

use_fakes()
register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

VERIFY = StepKind("verify", 3)
BUCKETS = [1, 2, 4]
# What a drafter reads of sampling parameters.
GREEDY = SimpleNamespace(is_all_greedy=True)


def setUpModule():
    torch.set_num_threads(1)


class Captured:
    """The harness's layers as a step that is captured; a step of several rows finds its lengths in ``relay``."""

    def __init__(self, kind, in_graph=True):
        self.harness = harness = AttentionHarness(drafts=True, seed=5)
        for buffer in harness.pools.buffers():
            buffer.zero_()
        harness.requests.req_to_token.zero_()
        with mock.patch.dict("os.environ", {"SGLANG_PREP_IN_CUDA_GRAPH": str(int(in_graph))}):
            harness.backend = DeepseekV4HipRadixBackend(harness.context)
        self.kind, self.platform = kind, RocmOverFakesPlatform(find_fakes())
        rows = harness.requests.padding_row + 1
        self.last = torch.zeros(rows, dtype=torch.int64)
        self.relay = StepRelay.make(rows, kind.rows_per_request - 1, CPU)
        self.graphs = StepGraphs(
            kind, self.forward, harness.backend, BUCKETS, CONTEXT - 8, CPU, harness.requests.padding_row, False
        )

    @torch.inference_mode()
    def capture(self, eager=None):
        """Capture and check; returns why buckets are refused."""
        harness, width = self.harness, self.kind.rows_per_request

        def as_captured(batch, bucket):
            forward_batch = self.graphs.fill(batch, bucket)
            forward_batch.seq_lens_cpu = HostList(forward_batch.seq_lens_cpu)
            return self.forward(forward_batch).first(batch.batch_size * width).tensors()

        def replay(batch, bucket):
            return self.graphs.replay(batch, bucket)[1].tensors()

        with override_platform(self.platform):
            self.graphs.capture(self.platform.create_graph)
            harness.window.clear()
            memory = RankMemory(None, 256, harness.requests, self.last, None, harness.window, self.relay)
            GraphCheck(self.graphs, self.kind, eager or as_captured, replay, memory, harness.pools, VOCAB).run()
            harness.lend_windows()
        return self.graphs.refused

    def planned_anew(self, batch, bucket):
        """The step as it is run without graphs, padded."""
        width = self.kind.rows_per_request
        self.graphs.buffers.fill(batch, bucket)
        forward_batch = self.graphs.buffers.view(bucket, self.harness.backend, False, batch)
        if width == 1:
            self.harness.backend.init_forward_metadata(forward_batch)
        return self.forward(forward_batch).first(batch.batch_size * width).tensors()

    def forward(self, forward_batch):
        harness, rows, width = self.harness, forward_batch.req_pool_indices, self.kind.rows_per_request
        forward_batch, positions = copy.copy(forward_batch), forward_batch.positions.view(-1, width)
        harness.requests.write_step(rows, positions, forward_batch.out_cache_loc.view(-1, width))
        forward_batch.input_ids = torch.cat([self.last[rows].unsqueeze(1), self.relay.drafts[rows]], dim=1).flatten()
        if width > 1:
            place_rows(forward_batch, self.relay, harness.requests)
            harness.backend.init_forward_metadata(forward_batch)
        x = harness.embedding.index_select(0, forward_batch.input_ids)
        outputs = [layer.on_backend(x, harness.backend, forward_batch).flatten(1) for layer in harness.layers]
        return LogitsProcessorOutput(torch.cat(outputs, dim=1))

    @torch.inference_mode()
    def replay(self, chunks, bucket):
        """Run the next tokens of each request through the graph; the outputs and the plan that the graph used."""
        batch = self.harness.batch(chunks, self.kind)
        for request, tokens in chunks:
            self.last[request.row], self.relay.committed[request.row] = tokens[0], len(request.tokens)
            self.relay.drafts[request.row] = torch.tensor(tokens[1:], dtype=torch.int64)
        _, output = self.graphs.replay(batch, bucket)
        for request, tokens in chunks:
            request.tokens = [*request.tokens, *tokens]
        by_layer = output.next_token_logits.unflatten(1, (3, 3, 24)).unbind(1)
        return [list(rows.split(self.kind.rows_per_request)) for rows in by_layer]


class TestCapturedSteps(CustomTestCase):
    def test_every_bucket_is_proven_and_replays_are_the_truth(self):
        for kind, in_graph in ((DECODE, True), (DECODE, False), (VERIFY, True)):
            with self.subTest(kind=kind.name, in_graph=in_graph):
                captured = Captured(kind, in_graph)
                self.assertEqual(captured.capture(), {})
                pools = captured.harness.pools
                fresh = ModelPools(pools.layout, {unit: pools.size(unit) for unit in (FULL, SWA)}, PAGE_SIZE, CPU)
                for ours, as_made in zip(pools.buffers(), fresh.buffers(), strict=True):
                    self.assertTrue(torch.equal(ours.nan_to_num(7), as_made.nan_to_num(7)))
                self.check_replays(captured)

    def check_replays(self, captured):
        harness, width = captured.harness, captured.kind.rows_per_request
        requests = [harness.new_request() for _ in range(4)]
        lengths = (126, 255, 3, 509)
        with torch.inference_mode():
            harness.step([(request, harness.random_tokens(n)) for request, n in zip(requests, lengths)])
        for members in (requests, requests[:1], requests[1:], requests[2:], requests):
            chunks = [(request, harness.random_tokens(width)) for request in members]
            harness.check(chunks, captured.replay(chunks, 4 if len(members) > 2 else len(members)))
            for request in members:
                request.tokens = request.tokens[: len(request.tokens) - harness.random.randrange(width)]

    def test_the_plan_in_the_graph_is_that_before_it(self):
        """Bit by bit, for decode steps of random lengths, padded and full."""
        plans = []
        for in_graph in (True, False):
            captured = Captured(DECODE, in_graph)
            with override_platform(captured.platform), torch.inference_mode():
                captured.graphs.capture(captured.platform.create_graph)
            harness, used = captured.harness, {}
            real = DeepseekV4HipRadixBackend._plan_of
            self.assertEqual(
                {type(plan).__name__ for plan in harness.backend._captured.values()},
                {"PlanInGraph" if in_graph else "CompressedPlan"},
            )

            def keep(backend, forward_batch, num_rows, used=used, real=real):
                used[forward_batch.batch_size] = real(backend, forward_batch, num_rows)
                return used[forward_batch.batch_size]

            # Captured once more, with the plan of each bucket kept.
            with (
                mock.patch.object(DeepseekV4HipRadixBackend, "_plan_of", keep),
                override_platform(captured.platform),
                torch.inference_mode(),
            ):
                captured.graphs.capture(captured.platform.create_graph)
            requests = [harness.new_request() for _ in range(4)]
            with torch.inference_mode():
                harness.step([(request, harness.random_tokens(n)) for request, n in zip(requests, (120, 250, 1, 500))])
            found = []
            for turn in range(24):
                members = requests[: 1 + turn % 4]
                bucket = 4 if len(members) > 2 else len(members)
                captured.replay([(request, harness.random_tokens(1)) for request in members], bucket)
                assert isinstance(used[bucket], CompressedPlan)
                found.append([tensor.clone() for tensor in used[bucket].tensors()])
            plans.append(found)
        for inside, outside in zip(*plans, strict=True):
            for ours, theirs in zip(inside, outside, strict=True):
                self.assertTrue(torch.equal(ours, theirs))

    def test_a_plan_that_a_replay_does_not_bring_up_to_date_is_refused(self):
        captured = Captured(DECODE, in_graph=False)
        replay = DeepseekV4HipRadixBackend.init_forward_metadata_replay

        def forget(backend, forward_batch):
            with mock.patch.object(CompressedPlan, "tensors", lambda plan: iter(())):
                replay(backend, forward_batch)

        with mock.patch.object(DeepseekV4HipRadixBackend, "init_forward_metadata_replay", forget):
            self.assertEqual(sorted(captured.capture(captured.planned_anew)), BUCKETS)

    def test_rows_that_share_a_page_would_not_be_proven(self):
        """On slots scattered as tokens, two requests would write one entry or one row of states."""
        captured = Captured(DECODE)
        pools = captured.harness.pools
        memory = RankMemory(None, 256, captured.harness.requests, captured.last, None, relay=captured.relay)
        check = GraphCheck(captured.graphs, DECODE, None, None, memory, pools, VOCAB)
        rows = [captured.harness.requests.alloc() for _ in range(4)]
        batch = check._batch(rows, 8, torch.Generator().manual_seed(0))
        self.assertEqual(batch.seq_lens, [260, 128, 17, 1])
        pages = []
        for row, length in zip(rows, batch.seq_lens):
            slots = captured.harness.requests.read(row, 0, length)
            self.assertEqual((slots % 256).tolist(), [p % 256 for p in range(length)])
            pages += sorted(set((slots // 256).tolist()))
        self.assertEqual((len(pages), len(set(pages)), min(pages) > 0), (5, 5, True))


class TestDraftChain(CustomTestCase):
    """Chains of drafts of a layer with a window alone, by the drafter, against the sequence that they make."""

    STEPS = 4

    def setUp(self):
        self.harness = harness = AttentionHarness(drafts=True, seed=6)
        harness.layers = harness.layers[:1]
        harness.backend = DeepseekV4HipRadixBackend(harness.context, windows_only=True)
        self.head = torch.randn(72, VOCAB, generator=torch.Generator().manual_seed(1))
        self.slots = {}
        target = SimpleNamespace(sampler=SimpleNamespace(draft=self.best), req_to_token_pool=harness.requests)
        decode = DeepseekV4MultiStepBackend(harness.context, self.STEPS - 1)
        self.drafter = MtpDrafter(self.model, target, harness.backend, decode, SpecInfo(self.STEPS))

    @staticmethod
    def best(logits, info, positions):
        return logits.argmax(-1)

    def model(self, ids, positions, forward_batch, hidden):
        self.slots.setdefault(forward_batch.batch_size, []).append(forward_batch.out_cache_loc)
        self.assertTrue(
            forward_batch.attn_plan.attention.store_slots.is_contiguous(), "kernels read slots one behind the other"
        )
        x = self.harness.embedding.index_select(0, ids)
        out = self.harness.layers[0].on_backend(x, forward_batch.attn_backend, forward_batch).flatten(1)
        return LogitsProcessorOutput(out @ self.head, hidden_states=out)

    def begin(self, size):
        """Requests whose tokens are in the pools, with slots ahead; the chain's inputs for ``size`` of them."""
        lengths = (126, 254, 3, 511, 128, 1, 255)[:size]
        self.harness.reset()
        requests = [self.harness.new_request() for _ in lengths]
        self.harness.step([(one, self.harness.random_tokens(n)) for one, n in zip(requests, lengths)])
        for one, length in zip(requests, lengths):
            self.harness.requests.write(one.row, 0, self.harness.slots(one, 0, length + self.STEPS))
        self.harness.requests.req_to_token[self.harness.requests.padding_row].zero_()
        first = torch.tensor(self.harness.random_tokens(size))
        return requests, torch.tensor([one.row for one in requests]), torch.tensor(lengths) - 1, first

    def check(self, requests, drafts):
        for one, chain in zip(requests, drafts.tolist()):
            length = len(one.tokens)
            truth = self.harness.truths([*one.tokens, *chain], range(length, length + self.STEPS - 1))[0]
            self.assertEqual(chain[1:], (truth.flatten(1) @ self.head.double()).argmax(-1).tolist())

    @torch.inference_mode()
    def test_eager(self):
        for size in (1, 2, 7):
            requests, rows, at, first = self.begin(size)
            self.slots.clear()
            bounds = [len(one.tokens) for one in requests]
            start = ChainStart(one_hot(first, VOCAB).float(), torch.zeros(size, 72), at)
            self.check(requests, self.drafter.go_on(rows, start, GREEDY, torch.tensor([size]), bounds).ids)
            for step, slots in enumerate(self.slots[size]):
                wanted = [
                    int(self.harness.slots(one, n, n + 1)) for one, n in zip(requests, [b + step for b in bounds])
                ]
                self.assertEqual(slots.tolist(), wanted)

    @torch.inference_mode()
    def test_captured_and_padded(self):
        bucket, platform = 4, RocmOverFakesPlatform(find_fakes())
        padding = self.harness.requests.padding_row
        rows, at = torch.full((bucket,), padding), torch.zeros(bucket, dtype=torch.int64)
        start = ChainStart(torch.zeros(bucket, VOCAB), torch.zeros(bucket, 72), at)
        self.begin(1)

        graphs = BucketGraphs("draft", [bucket], CPU)
        num_tokens = torch.tensor([bucket])

        def body():
            return self.drafter.go_on(rows, start, GREEDY, num_tokens, None)

        with override_platform(platform):
            graphs.capture_all(lambda bucket: body, platform.create_graph)
            self.assertEqual(graphs.refused, {})
            for size in (1, 2, 4, 3, 2):
                requests, own_rows, own_at, first = self.begin(size)
                start.logits.zero_()
                for ours, value, rest in ((rows, own_rows, padding), (at, own_at, 0)):
                    ours.fill_(rest)
                    ours[:size] = value
                start.logits[:size] = one_hot(first, VOCAB)
                self.check(requests, graphs.run(bucket).ids[:size])

    def test_slots_are_by_request_and_step(self):
        slots = torch.tensor([10, 11, 12, 20, 21, 22])
        self.assertEqual(per_step_draft_out_cache_loc(slots, 2, 3).tolist(), [[10, 20], [11, 21], [12, 22]])
        with self.assertRaisesRegex(ValueError, "4 requests of 3 draft steps have 6 slots"):
            per_step_draft_out_cache_loc(slots, 4, 3)
        batch = ModelWorkerBatch.uniform(StepKind("draft chain", 2), [0], [2], slots[:2])
        forward_batch = ForwardBatch.from_worker_batch(batch, CPU, None)
        with self.assertRaisesRegex(ValueError, "3 draft steps, and 2 rows per request"):
            self.drafter.decode_backend.init_forward_metadata(forward_batch)


class TestServed(CustomTestCase):
    """The whole model under the policy of HIP: its decode steps are captured, checked and replayed."""

    def engine(self, model, **settings):
        return EngineHarness(
            model, max_total_tokens=8192, max_running_requests=8, attention_backend="dsv4", page_size=256,
            cuda_graph_bs=[1, 8], random_seed=1, **settings,
        )  # fmt: skip

    def tokens(self, engine):
        params = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)
        for number in range(7):
            engine.submit(f"r{number}", [(7 * i + number) % 500 for i in range(100 + 27 * number)], params)
        return {rid: result.output_ids for rid, result in engine.run().items()}

    def test_replayed_steps_give_the_tokens_of_eager_ones(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_checkpoint("dsv4", folder)
        wanted = self.tokens(self.engine(folder, disable_cuda_graph=True))
        for in_graph in ("1", "0"):
            with (
                self.subTest(in_graph=in_graph),
                mock.patch.dict("os.environ", {"SGLANG_PREP_IN_CUDA_GRAPH": in_graph}),
                fresh_decisions(),
                override_platform(RocmOverFakesPlatform(find_fakes())),
            ):
                engine = self.engine(folder)
                graphs = engine.runner.decode_graphs
                self.assertEqual((graphs.refused, sorted(graphs._steps)), ({}, [1, 8]))
                with mock.patch.object(graphs, "replay", wraps=graphs.replay) as replay:
                    self.assertEqual(self.tokens(engine), wanted)
                self.assertGreater(replay.call_count, 5)


if __name__ == "__main__":
    unittest.main()
