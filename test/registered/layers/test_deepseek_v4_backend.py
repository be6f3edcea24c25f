"""The backend of DeepSeek V4 against attention in float64 over whole sequences, for every kind of step."""

import unittest
from types import SimpleNamespace

import torch

from sglang.srt.configs.attention_backends import attention_backends
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionContext, UnplannedStepError
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import DeepseekV4HipRadixBackend
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch, StepKind
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import CPU, AttentionHarness
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

# Around the ends of a window, of an entry of 128 tokens and of pages.
PREFIXES = (*range(124, 133), *range(252, 261), *range(508, 517))
LENGTHS = (1, 127, 128, 129, 255, 256, 257, 511, 600)


def setUpModule():
    torch.set_num_threads(1)


class TestPrompts(CustomTestCase):
    @torch.inference_mode()
    def test_lengths_in_one_step_then_decode(self):
        harness = AttentionHarness()
        chunks = [(harness.new_request(), harness.random_tokens(length)) for length in LENGTHS]
        harness.step_and_check(chunks)
        for _ in range(5):
            harness.step_and_check([(request, harness.random_tokens(1)) for request, _ in chunks], DECODE)

    @torch.inference_mode()
    def test_chunks(self):
        """Chunks of 7, 64 and 256 tokens in common steps, together with a request that decodes."""
        harness = AttentionHarness(seed=1)
        decoding = harness.new_request()
        harness.step([(decoding, harness.random_tokens(250))])
        pending = {size: (harness.new_request(), harness.random_tokens(300 + size)) for size in (7, 64, 256)}
        while pending:
            chunks = [(request, tokens[:size]) for size, (request, tokens) in pending.items()]
            harness.step_and_check([*chunks, (decoding, harness.random_tokens(1))])
            left = {size: (request, tokens[size:]) for size, (request, tokens) in pending.items()}
            pending = {size: one for size, one in left.items() if one[1]}

    @torch.inference_mode()
    def test_prefix_hits(self):
        """Requests that share one or two pages of another, which continues too, and of one that has ended."""
        for chunk in (600, 100):
            harness = AttentionHarness(seed=2)
            first = harness.new_request()
            tokens = harness.random_tokens(600)
            for start in range(0, 600, chunk):
                harness.step([(first, tokens[start : start + chunk])])
            chunks = [
                (harness.new_request(first, pages), harness.random_tokens(new))
                for pages in (1, 2)
                for new in (1, 3, 130)
            ]
            harness.step_and_check([*chunks, (first, harness.random_tokens(2))])
            harness.drop(first)
            for _ in range(6):
                harness.step_and_check([(request, harness.random_tokens(1)) for request, _ in chunks], DECODE)

    @torch.inference_mode()
    def test_pools_of_fewer_bits(self):
        """With ratio 4, a rounded key may select another entry."""
        for kv, bounds in (
            ("bfloat16", (0.02, 0.02, 0.02)), ("float8_e4m3fn", (0.05, 0.15, 0.05)),
            ("float8_e4m3fnuz", (0.05, 0.15, 0.05)),
        ):  # fmt: skip
            harness = AttentionHarness(kv=kv)
            request, neighbour = harness.new_request(), harness.new_request()
            tokens = harness.random_tokens(300)
            outputs = harness.step([(request, tokens[:299]), (neighbour, tokens[:140])])
            last = harness.step([(request, tokens[299:]), (neighbour, tokens[140:141])], DECODE)
            for layer, truth in enumerate(harness.truths(tokens, range(300))):
                found = torch.cat((outputs[layer][0], last[layer][0]))
                off = (found.double() - truth).abs().mean(2) / truth.abs().mean()
                self.assertLess(float(off.mean()), bounds[layer], (kv, layer))
                self.assertLess(float(off[-1].mean()), 2 * bounds[layer], (kv, layer))


class TestVerify(CustomTestCase):
    @torch.inference_mode()
    def check(self, width, prefixes, seed=3):
        """Each accepted length as a request of its own; what comes after is compared."""
        harness = AttentionHarness(num_pages=200, drafts=True, seed=seed)
        kind = StepKind("verify", width)
        base = harness.new_request()
        harness.step([(base, harness.random_tokens(512))])
        for prefix in prefixes:
            pages = prefix // 256
            requests = [harness.new_request(base, pages) for _ in range(width)]
            start = [(request, harness.random_tokens(prefix - 256 * pages)) for request in requests]
            if prefix > 256 * pages:
                harness.step(start)
            drafts = [(request, harness.random_tokens(width)) for request in requests]
            outputs = harness.step(drafts, kind)
            harness.check(drafts, outputs)
            for accepted, request in enumerate(requests, 1):
                request.tokens = request.tokens[: prefix + accepted]
            harness.step_and_check([(request, harness.random_tokens(width)) for request in requests], kind)
            for request in requests:
                request.tokens = request.tokens[: -width + 1]
            harness.step_and_check([(request, harness.random_tokens(5)) for request in requests])
            harness.drop(*requests)
            harness.free = [page for page in range(1, 201) if page not in base.pages]

    def test_two_rows(self):
        self.check(2, PREFIXES)

    def test_four_rows(self):
        self.check(4, PREFIXES)

    def test_eight_rows(self):
        self.check(8, PREFIXES)

    def test_ten_rows(self):
        self.check(10, (118,))

    @torch.inference_mode()
    def test_ragged(self):
        """One, two and four rows in one verify step; the rings of speculation keep states of each accepted length."""
        harness = AttentionHarness(drafts=True, seed=4)
        requests = [harness.new_request() for _ in range(6)]
        prefixes = (126, 255, 3, 130, 252, 127)
        harness.step([(request, harness.random_tokens(n)) for request, n in zip(requests, prefixes)])
        for _ in range(4):
            widths = [harness.random.choice((1, 2, 4)) for _ in requests]
            chunks = [(request, harness.random_tokens(n)) for request, n in zip(requests, widths)]
            forward_batch = ForwardBatch.from_worker_batch(harness.batch(chunks, None), CPU, harness.backend)
            harness.backend.init_forward_metadata_target_verify(forward_batch, torch.tensor(widths), 4)
            harness.check(chunks, harness.run(forward_batch, chunks))
            for (request, _), width in zip(chunks, widths):
                request.tokens = request.tokens[: len(request.tokens) - harness.random.randrange(width)]

    def test_a_step_that_the_states_do_not_bear_is_refused(self):
        for drafts, most in ((False, 2), (True, 10)):
            harness = AttentionHarness(drafts=drafts)
            request = harness.new_request()
            with self.assertRaisesRegex(UnplannedStepError, f"allow {most}; lower --speculative-num-steps"):
                harness.step([(request, harness.random_tokens(most + 1))], StepKind("verify", most + 1))
            harness.step([(request, harness.random_tokens(most))], StepKind("verify", most))


class TestBackend(CustomTestCase):
    def test_declared_for_every_platform(self):
        declared = attention_backends("compressed")
        self.assertEqual(sorted(declared), ["compressed", "dsv4"])
        self.assertEqual(declared["dsv4"].platforms, ("cpu", "cuda", "hip"))
        self.assertEqual(declared["dsv4"].page_sizes, (256,))
        harness = AttentionHarness()
        harness.context.model_config.text = harness.config
        for name in declared:
            self.assertIsInstance(make_attention_backend(name, harness.context), DeepseekV4HipRadixBackend)

    def test_pages_of_another_size_are_refused(self):
        harness = AttentionHarness()
        pools = ModelPools(SimpleNamespace(units=(FULL,), pools=()), {FULL: 64}, 16, CPU)
        context = AttentionContext(harness.context.model_config, harness.requests, pools, CPU)
        with self.assertRaisesRegex(ValueError, "pools have pages of 16: use --page-size 256"):
            DeepseekV4HipRadixBackend(context)

    def test_layers_of_a_window_alone_need_no_plan_of_entries(self):
        harness = AttentionHarness(drafts=True)
        harness.backend = DeepseekV4HipRadixBackend(harness.context, windows_only=True)
        harness.layers = harness.layers[:1]
        request = harness.new_request()
        for new in (130, 1):
            chunks = [(request, harness.random_tokens(new))]
            forward_batch = ForwardBatch.from_worker_batch(harness.batch(chunks, None), CPU, harness.backend)
            harness.backend.init_forward_metadata(forward_batch)
            self.assertEqual(forward_batch.attn_plan.attention.entries, {})
            harness.check(chunks, harness.run(forward_batch, chunks))

    def test_a_step_without_rows(self):
        harness = AttentionHarness()
        forward_batch = ForwardBatch.from_worker_batch(ModelWorkerBatch.idle(), CPU, harness.backend)
        harness.backend.init_forward_metadata(forward_batch)
        for layer in harness.layers:
            self.assertEqual(layer.on_backend(torch.empty(0, 20), harness.backend, forward_batch).shape, (0, 3, 24))
            with self.assertRaisesRegex(TypeError, "2 rows to attend, and the step was planned as NoRows"):
                harness.backend.attend_compressed(torch.empty(2, 3, 24), layer, forward_batch)


if __name__ == "__main__":
    unittest.main()
