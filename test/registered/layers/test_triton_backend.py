"""The Triton backend's plans over the references of its ops, against the torch backend on the same pools."""

import dataclasses
import json
import tempfile
import unittest
from pathlib import Path

import torch

from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Impl, Op
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.plans import ChunkedPrefixPlan
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ForwardMode, ModelWorkerBatch
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

ARCHITECTURES = {"dsv2": "DeepseekV2ForCausalLM", "dsv3": "DeepseekV3ForCausalLM", "q35": "Qwen3_5ForCausalLM"}
PLANTED = ("attention", "attention_state", "kv_cache", "prepare", "moe")
LENGTHS = (90, 33, 2, 1, 40)


def never(new_tokens, total_tokens):
    return False


def always(new_tokens, total_tokens):
    return True


def make_harness(test, name, page_size=1):
    """A harness with dummy weights, and its Triton backend over the same pools."""
    folder = test.enterContext(tempfile.TemporaryDirectory())
    config = {**TINY_CONFIGS[name], "architectures": [ARCHITECTURES[name]]}
    Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
    harness = ModelHarness(folder, num_slots=1024, max_requests=16, page_size=page_size, load_format="dummy")
    context = harness.context()
    return harness, make_attention_backend("triton", context)


def steps(harness, backend):
    """Fresh prompts, a mixed step with prefixes, then decode; the log-probabilities of every row of every step."""
    harness.reset()
    for buffer in harness.pools.buffers(FULL):
        buffer.fill_(float("nan"))
    harness.backend = backend
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    requests = [harness.new_request() for _ in prompts]
    cuts = (60, 32, 1, 0, 3)
    started = [i for i, cut in enumerate(cuts) if cut]
    rows = list(harness.extend([(requests[i], prompts[i][: cuts[i]]) for i in started]))
    rest = [(request, prompt[cut:]) for request, prompt, cut in zip(requests, prompts, cuts, strict=True)]
    rows += harness.extend(rest, mode=ForwardMode.MIXED)
    for token in (5, 77):
        rows += harness.decode([(request, token + i) for i, request in enumerate(requests)])
    return rows


def full(backend):
    """The backend of softmax layers."""
    return getattr(backend, "full_attn_backend", backend)


class TestAgainstTorchNative(CustomTestCase):
    def assert_same(self, found, wanted):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)

    def test_grouped_query_and_recurrent_layers(self):
        for page_size in (1, 16):
            harness, backend = make_harness(self, "q35", page_size)
            wanted = steps(harness, harness.backend)
            self.assertGreater(wanted[0].std().item(), 0.05)
            self.assert_same(steps(harness, backend), wanted)

    def test_latent_attention_in_all_forms(self):
        for name in ("dsv2", "dsv3"):
            harness, backend = make_harness(self, name)
            native = harness.backend
            wanted = steps(harness, native)
            auto = backend.use_mha
            for rule in (auto, never, always):
                with self.subTest(name=name, rule=getattr(rule, "__name__", "auto")):
                    backend.use_mha = rule
                    self.assert_same(steps(harness, backend), wanted)
            backend.use_mha = auto
            with self.subTest("both backends choose alike"):
                new_and_total = [(1, 5), (3, 4000), (64, 64), (200, 900)]
                self.assertEqual([auto(*pair) for pair in new_and_total], [native.use_mha(*p) for p in new_and_total])

    def test_long_prefixes_are_expanded_in_parts(self):
        harness, backend = make_harness(self, "dsv2", page_size=4)
        native = harness.backend
        wanted = steps(harness, native)
        backend.use_mha = always
        plans = []
        plan_expanded = backend.expanded_plan
        backend.expanded_plan = lambda forward_batch, members: (
            plans.append(plan_expanded(forward_batch, members)) or plans[-1]
        )
        for limit, parts in ((50, 5), (1, 60)):
            backend.max_expanded_rows = limit
            self.assert_same(steps(harness, backend), wanted)
            self.assertIsInstance(plans[-1], ChunkedPrefixPlan)
            self.assertEqual(len(plans[-1].prefix), parts)
            rows = [part.kv_slot_ids.numel() for part in plans[-1].prefix]
            self.assertEqual(sum(rows), 96)
            self.assertLessEqual(max(rows), max(limit, 4))

    def test_nothing_to_do(self):
        for name in ("q35", "dsv2"):
            harness, backend = make_harness(self, name)
            harness.backend = backend
            self.assertEqual(harness.idle().next_token_logits.shape[0], 0)


class TestGraphHooks(CustomTestCase):
    def batch(self, harness, backend, rows, lens):
        slots = [int(harness.requests.read(row, length - 1, length)[0]) for row, length in zip(rows, lens)]
        host = ModelWorkerBatch.uniform(DECODE, rows, lens, torch.tensor(slots))
        host = dataclasses.replace(host, input_ids=torch.arange(len(rows)) + 7)
        return ForwardBatch.from_worker_batch(host, torch.device("cpu"), backend)

    def test_a_replayed_step_reads_the_captured_tensors(self):
        harness, backend = make_harness(self, "dsv2")
        self.assertIsInstance(full(backend), TritonAttnBackend)
        harness.backend = backend
        requests = [harness.new_request() for _ in range(3)]
        harness.extend([(request, list(range(5, 25))) for request in requests])
        rows = [request.row for request in requests]
        backend.init_cuda_graph_state(4, 100)
        captured = self.batch(harness, backend, rows[:2], [1, 1])
        backend.init_forward_metadata_capture(captured)
        wanted = self.batch(harness, backend, rows[1:], [20, 11])
        with torch.inference_mode():
            backend.init_forward_metadata(wanted)
            eager = harness.model(wanted.input_ids, wanted.positions, wanted)
            for field in ("input_ids", "positions", "req_pool_indices", "seq_lens", "out_cache_loc"):
                getattr(captured, field).copy_(getattr(wanted, field))
            # The host lists of the captured batch are stale on purpose: nothing may read them.
            backend.init_forward_metadata_replay(captured)
            replayed = harness.model(captured.input_ids, captured.positions, captured)
        self.assertTrue(torch.equal(eager.next_token_logits, replayed.next_token_logits))

    def test_other_tensors_and_sizes_are_refused(self):
        harness, backend = make_harness(self, "dsv2")
        harness.backend = backend
        request = harness.new_request()
        harness.extend([(request, list(range(5, 25)))])
        backend.init_cuda_graph_state(4, 100)
        first = self.batch(harness, backend, [request.row], [20])
        backend.init_forward_metadata_capture(first)
        with self.assertRaisesRegex(ValueError, "other tensors"):
            backend.init_forward_metadata_replay(dataclasses.replace(first, seq_lens=first.seq_lens.clone()))
        with self.assertRaisesRegex(ValueError, "no decode step of 2"):
            backend.init_forward_metadata_replay(self.batch(harness, backend, [request.row] * 2, [20, 20]))
        with self.assertRaisesRegex(ValueError, "request table of as many columns"):
            backend.init_cuda_graph_state(4, 1 << 20)


class TestPreference(CustomTestCase):
    def test_the_torch_backend_prefers_torch_for_its_ops_and_no_other(self):
        ops = [Op(f"{group}.planted", *(Impl(n, lambda n=n: n) for n in ("fast", "torch"))) for group in PLANTED]
        for op in ops:
            self.addCleanup(REGISTRY.ops.pop, op.name)
        with fresh_decisions():
            harness, _ = make_harness(self, "dsv3")
            context = harness.context()
            for name, chosen in (("torch_native", "torch"), ("triton", "fast")):
                make_attention_backend(name, context)
                self.assertEqual([op() for op in ops], [chosen] * 4 + ["fast"], name)


if __name__ == "__main__":
    unittest.main()
