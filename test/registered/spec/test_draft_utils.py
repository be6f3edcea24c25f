"""The backends of a draft model: by its own family, pools and layer, and never one of another platform."""

import unittest
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.configs import attention_backends as declarations
from sglang.srt.configs.attention_backends import BackendDeclaration, attention_backends
from sglang.srt.configs.cache_layout import FULL, STATE, SWA
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import (
    DeepseekV4HipRadixBackend,
    DeepseekV4MultiStepBackend,
)
from sglang.srt.layers.attention.pool_backend import GqaBackend, MlaBackend
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.model_executor.model_pools import cache_layout
from sglang.srt.platforms import current_platform, override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.draft_utils import DraftBackendFactory
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import AttentionHarness
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

FAMILIES = {"deepseek-v3-tiny": ("mla", MlaBackend), "qwen3.5-moe-tiny": ("gqa", GqaBackend)}


class CudaOnly:
    """A backend that is declared only for CUDA."""

    def __init__(self, context):
        pass


def context_of(name, num_draft_tokens=4):
    config, device = ModelConfig.from_path(str(EMBEDDED_MODELS[name])), torch.device("cpu")
    layout = cache_layout(config, 1, num_draft_tokens=num_draft_tokens)
    pools = ModelPools(layout, {FULL: 64, SWA: 64, STATE: 2}, 1, device)
    windows = torch.zeros(2, dtype=torch.int32)
    return AttentionContext(config, ReqToTokenPool(2, 64, device), pools, device, windows)


class TestDraftBackendFactory(CustomTestCase):
    def setUp(self):
        # What SGLANG_PLATFORM=rocm selects on a machine without a GPU.
        self.enterContext(override_platform(RocmOverFakesPlatform(("aiter", "mori"))))
        self.assertEqual(current_platform.kind, "hip")

    def declare_for_cuda(self, family, *, alone):
        """A backend of CUDA, declared before those of the tree (or instead of them) and there to be created."""
        known = {("cuda_only", family): BackendDeclaration("cuda_only", family, ("cuda",))}
        known |= {} if alone else declarations._in_tree()
        self.enterContext(mock.patch.object(declarations, "_in_tree", lambda: known))
        self.enterContext(mock.patch.dict(declarations._declared, {}, clear=True))
        self.enterContext(mock.patch.dict(base_attn_backend._FACTORIES, {("cuda_only", family): CudaOnly}))

    def made(self, name, asked, context=None):
        context = context or context_of(name)
        factory = DraftBackendFactory(asked, context, context.model_config.num_hidden_layers, 3)
        return factory.create_decode_backend(), factory.create_prefill_backend()

    def test_every_entry_on_hip_is_declared_for_hip(self):
        for name, (family, interface) in FAMILIES.items():
            self.declare_for_cuda(family, alone=False)
            for asked in (*attention_backends(family), "aiter", "no_such_backend"):
                with self.subTest(model=name, asked=asked):
                    for backend in self.made(name, asked):
                        # Nor is it the wrapper of the target's recurrent layers.
                        self.assertIsInstance(backend, interface)
                        self.assertRegex(type(backend).__module__, r"\.(torch_native|triton)_backend$")

    def test_a_name_that_is_declared_is_taken(self):
        for name, (family, _) in FAMILIES.items():
            for asked in ("torch_native", "triton"):
                self.assertIn("hip", attention_backends(family)[asked].platforms)
                for backend in self.made(name, asked):
                    self.assertTrue(type(backend).__module__.endswith(f".{asked}_backend"))

    def test_without_a_backend_of_the_platform_it_is_refused(self):
        self.declare_for_cuda("mla", alone=True)
        with self.assertRaisesRegex(ConfigError, r"family mla runs on hip; declared: cuda_only \(cuda\)"):
            self.made("deepseek-v3-tiny", "cuda_only")

    def test_pools_without_the_layer_of_the_draft_are_refused(self):
        for name in FAMILIES:
            with self.assertRaisesRegex(ValueError, "the draft model's KV is layer"):
                self.made(name, "torch_native", context_of(name, num_draft_tokens=0))

    def test_the_two_kinds_of_step_have_backends_of_their_own(self):
        decode, prefill = self.made("deepseek-v3-tiny", "torch_native")
        self.assertIsNot(decode, prefill)

    def test_plans_of_other_backends_and_tables_are_not_taken(self):
        for name in FAMILIES:
            context = context_of(name)
            native, again = self.made(name, "torch_native", context)
            elsewhere, _ = self.made(name, "torch_native")
            triton, _ = self.made(name, "triton", context)
            self.assertTrue(native.plans_like(again) and native.plans_like(SimpleNamespace(full_attn_backend=again)))
            for backend, other in ((native, elsewhere), (native, triton), (triton, native), (triton, triton)):
                self.assertFalse(backend.plans_like(other))

    def test_deepseek_v4_gets_the_classes_of_hip(self):
        """No other backend is used, whichever is requested: one per step of the chain, one for the rows before it."""
        context = AttentionHarness(drafts=True).context
        context.model_config.num_hidden_layers = context.model_config.text.num_hidden_layers
        for asked in ("dsv4", "compressed", "triton"):
            decode, prefill = self.made("", asked, context)
            self.assertIs(type(decode), DeepseekV4MultiStepBackend)
            self.assertIs(type(prefill), DeepseekV4HipRadixBackend)
            self.assertEqual([child.rings for child in (*decode.children, prefill)], [{}, {}, {}])


class TestEagerSteps(CustomTestCase):
    """Work that a host need not repeat: planning a verify step's rows, and reading past the accepted tokens."""

    def test_the_layer_takes_the_plan_of_the_step_and_chains_know_their_lengths(self):
        for name in FAMILIES:
            harness = EngineHarness(
                str(EMBEDDED_MODELS[name]), max_total_tokens=256, max_running_requests=3, dtype="float32",
                speculative_algorithm="NEXTN", speculative_num_steps=3,
            )  # fmt: skip
            drafter = harness.worker.speculator.drafter
            lengths = []

            def plan(forward_batch, decode_plan=drafter.decode_backend.init_forward_metadata, lengths=lengths):
                lengths.append((list(forward_batch.seq_lens_cpu), forward_batch.seq_lens.tolist()))
                decode_plan(forward_batch)

            drafter.decode_backend.init_forward_metadata = plan
            drafter.extend_backend.init_forward_metadata = self.fail
            for number, text in enumerate((b"1+2=", b"rev:abcdef=", b"sort:31415=")):
                params = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
                harness.submit(str(number), list(text), params)
            harness.run()
            self.assertGreater(len(lengths), 4)
            self.assertEqual([host for host, _ in lengths], [device for _, device in lengths])


if __name__ == "__main__":
    unittest.main()
