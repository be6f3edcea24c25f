"""Attention backends: declarations, plans per step, kinds of step, families."""

import importlib.util
import sys
import tempfile
import textwrap
import unittest
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from sglang.srt.configs.attention_backends import _declared, attention_backends, read_source
from sglang.srt.configs.cache_layout import STATE
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.layers.attention import make_attention_backend, torch_native_backend
from sglang.srt.layers.attention.base_attn_backend import _FACTORIES, UnplannedStepError, backend_of
from sglang.srt.layers.attention.pool_backend import MlaBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch, StepKind, StepPlan
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, ServerArgsError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.model_harness import ModelHarness
from sglang.test.published_sizes import DEEPSEEK_V2_LITE, qwen35_like
from sglang.test.resolved_args import resolved
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=12, suite="stage-b-test-cpu")

CPU = torch.device("cpu")
MODELS = ("dsv3", "q35")
HYBRID_MODELS = ("q35",)
PLANTED = '''
from sglang.srt.layers.attention.base_attn_backend import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeGqaBackend


@register_attention_backend("planted", "gqa", platforms=("cpu",), page_sizes=(16, 64))
class PlantedBackend(TorchNativeGqaBackend):
    """Counts the steps that it plans."""

    planned = 0

    def init_forward_metadata(self, forward_batch):
        PlantedBackend.planned += 1
        super().init_forward_metadata(forward_batch)
'''


class BackendCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        for name in MODELS:
            save_tiny_checkpoint(name, f"{cls.folder}/{name}")

    def harness(self, name):
        return ModelHarness(f"{self.folder}/{name}", num_slots=512, max_requests=8)

    def backends(self, harness):
        """Every backend of the tree over the pools of ``harness``; Triton's runs on the references of its ops."""
        context = harness.context()
        return {name: make_attention_backend(name, context) for name in ("torch_native", "triton")}


class TestPlans(BackendCase):
    def test_a_kind_of_step_without_a_plan_raises(self):
        for name in HYBRID_MODELS:
            harness = self.harness(name)
            for kind, backend in self.backends(harness).items():
                with self.subTest(model=name, backend=kind):
                    batch = ModelWorkerBatch.uniform(StepKind("verify", 3), [0], [3], torch.arange(1, 4), [1])
                    forward_batch = ForwardBatch.from_worker_batch(batch, CPU, backend)
                    with self.assertRaisesRegex(UnplannedStepError, "no plan for a verify step of 3 rows per request"):
                        backend.init_forward_metadata(forward_batch)

    def test_rows_of_a_step_of_several_per_request_see_what_a_prompt_row_sees(self):
        for name in set(MODELS) - set(HYBRID_MODELS):
            for width in (2, 3):
                for kind, shared_from in (("torch_native", 1000), ("torch_native", 1), ("triton", 1)):
                    with self.subTest(model=name, backend=kind, width=width, shared_from=shared_from):
                        with patch.object(torch_native_backend, "_SHARED_LENGTH", shared_from):
                            self.check_wide_step(name, kind, width)

    def test_queries_of_a_request_read_it_once_where_that_pays(self):
        harness, kind = self.harness("q35"), StepKind("verify", 3)
        backend = self.backends(harness)["torch_native"].full_attn_backend
        layer = next(m for m in harness.model.modules() if isinstance(m, RadixAttention))
        lengths = [3, 17, 200]
        for buffer in backend.kv_pool.layer(layer.layer_id):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)))
        for row, length in enumerate(lengths):
            backend.req_to_token[row, :length] = torch.arange(length) + 200 * (row == 2) + 20 * (row == 1) + 1
        q = torch.randn(9, layer.num_heads, layer.head_dim, generator=torch.Generator().manual_seed(7))
        found = []
        for shared_from, tables in ((201, 9), (200, 3)):
            batch = ModelWorkerBatch.uniform(kind, [0, 1, 2], lengths, torch.arange(9))
            forward_batch = ForwardBatch.from_worker_batch(batch, CPU, backend)
            with patch.object(torch_native_backend, "_SHARED_LENGTH", shared_from):
                backend.init_forward_metadata(forward_batch)
            groups = forward_batch.attn_plan.attention
            self.assertEqual([len(groups), sum(len(group.slot_table) for group in groups)], [2, tables])
            found.append(backend.attend(q, layer, forward_batch))
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)

    def check_wide_step(self, name, kind, width):
        prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], [2, 3, 4, 5] * 30]
        news = [[11 + 3 * i + j for j in range(width)] for i in range(len(prompts))]
        results = []
        for wide in (False, True):
            harness = self.harness(name)
            harness.backend = self.backends(harness)[kind]
            requests = [harness.new_request() for _ in prompts]
            harness.extend(list(zip(requests, prompts, strict=True)))
            if not wide:
                results.append(torch.cat(harness.extend(list(zip(requests, news, strict=True)))))
                continue
            slots = harness.allocator.alloc(width * len(prompts)).view(-1, width)
            for request, mine in zip(requests, slots, strict=True):
                harness.requests.write(request.row, request.num_tokens, mine)
            ends = [request.num_tokens + width for request in requests]
            batch = ModelWorkerBatch.uniform(
                StepKind("verify", width), [request.row for request in requests], ends, slots.flatten()
            )
            out = harness.run(replace(batch, input_ids=torch.tensor(news).flatten()), every_row=True)
            results.append(out.next_token_logits.log_softmax(-1, dtype=torch.float32))
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)

    def test_rows_that_nobody_planned_are_not_attended(self):
        """Layers of a step that was not planned, or planned as empty, must not return memory that was never written."""
        for name in MODELS:
            harness = self.harness(name)
            for kind, backend in self.backends(harness).items():
                request = harness.new_request()
                batch = ModelWorkerBatch.uniform(DECODE, [request.row], [1], torch.ones(1, dtype=torch.int64), [1])
                batch = replace(batch, input_ids=torch.ones(1, dtype=torch.int64))
                forward_batch = ForwardBatch.from_worker_batch(batch, CPU, backend)
                idle = ForwardBatch.from_worker_batch(ModelWorkerBatch.idle(), CPU, backend)
                backend.init_forward_metadata(idle)
                states = getattr(backend, "linear_attn_backend", None)
                for plan in (StepPlan(), idle.attn_plan):
                    forward_batch.attn_plan = StepPlan(
                        plan.attention, states.plan_states(forward_batch) if states else None
                    )
                    with self.subTest(model=name, backend=kind, plan=plan), torch.inference_mode():
                        with self.assertRaisesRegex(TypeError, "1 rows to attend"):
                            harness.model(forward_batch.input_ids, forward_batch.positions, forward_batch)

    def test_two_steps_are_in_flight_on_one_backend(self):
        for name in MODELS:
            harness = self.harness(name)
            for kind, backend in self.backends(harness).items():
                harness.reset()
                harness.backend = backend
                first, second = harness.new_request(), harness.new_request()
                harness.extend([(first, [5, 6, 7]), (second, [9, 8, 7, 6, 5])])
                steps = []
                for request, tokens in ((first, [11]), (second, [12, 13, 14])):
                    start = request.num_tokens
                    slots = harness.allocator.alloc(len(tokens))
                    harness.requests.write(request.row, start, slots)
                    states = None if request.state_slot is None else [request.state_slot]
                    ids = torch.tensor(tokens)
                    if len(tokens) == 1:
                        batch = replace(
                            ModelWorkerBatch.uniform(DECODE, [request.row], [start + 1], slots, states), input_ids=ids
                        )
                    else:
                        ends = [start + len(tokens)]
                        batch = ModelWorkerBatch.extend([request.row], [start], ends, ids, slots, states)
                    steps.append(ForwardBatch.from_worker_batch(batch, CPU, backend))
                wanted = [self.run_step(harness, forward_batch, plan_first=True) for forward_batch in steps]
                for forward_batch in steps:
                    backend.init_forward_metadata(forward_batch)
                found = [self.run_step(harness, forward_batch, plan_first=False) for forward_batch in steps]
                with self.subTest(model=name, backend=kind):
                    for ours, theirs in zip(found, wanted, strict=True):
                        self.assertTrue(torch.equal(ours, theirs))

    @torch.inference_mode()
    def run_step(self, harness, forward_batch, plan_first):
        """The logits of a step; recurrent states are as before afterwards."""
        buffers = harness.pools.buffers(STATE)
        before = [buffer.clone() for buffer in buffers]
        if plan_first:
            forward_batch.attn_backend.init_forward_metadata(forward_batch)
        logits = harness.model(
            forward_batch.input_ids, forward_batch.positions, forward_batch
        ).next_token_logits.clone()
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
        return logits

    def test_a_layer_refuses_a_backend_of_another_family(self):
        harness = self.harness("q35")
        forward_batch = ForwardBatch.from_worker_batch(ModelWorkerBatch.idle(), CPU, harness.backend)
        with self.assertRaisesRegex(TypeError, "needs a MlaBackend, and the step has HybridLinearAttnBackend"):
            backend_of(forward_batch, MlaBackend)


class TestDeclarations(BackendCase):
    def plant(self):
        """Import a backend from a file of its own, as a package next to ours would bring it."""
        path = Path(self.folder, "planted_backend.py")
        path.write_text(PLANTED, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("planted_backend", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["planted_backend"] = module
        self.addCleanup(sys.modules.pop, "planted_backend")
        self.addCleanup(_declared.pop, ("planted", "gqa"), None)
        self.addCleanup(_FACTORIES.pop, ("planted", "gqa"), None)
        spec.loader.exec_module(module)
        return module.PlantedBackend, path

    def test_one_file_adds_a_backend_that_serves(self):
        planted, path = self.plant()
        self.assertEqual(read_source(path), [_declared["planted", "gqa"]])
        outputs = []
        for backend in ("torch_native", "planted"):
            engine = EngineHarness(
                f"{self.folder}/q35", attention_backend=backend, page_size=16, max_total_tokens=512,
                max_running_requests=4,
            )  # fmt: skip
            engine.submit("r", [5, 6, 7, 8], SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True))
            outputs.append(engine.run()["r"].output_ids)
        self.assertEqual(outputs[0], outputs[1])
        self.assertGreaterEqual(planted.planned, 6)

    def test_the_settings_hold_a_backend_to_what_it_declares(self):
        self.plant()
        model = SimpleNamespace(
            text=Qwen3_5Config.from_hf(qwen35_like(4)["text_config"]), dtype=torch.float32, context_len=4096,
            quant_config=None, shared_fusion_refusal=lambda backend: "",
        )  # fmt: skip
        mla = SimpleNamespace(**{**vars(model), "text": DeepseekConfig.from_hf(DEEPSEEK_V2_LITE)})
        cpu = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
        cuda = SimpleNamespace(kind="cuda", device_type="cuda", supports_graphs=True)
        good = resolved(ServerArgs(attention_backend="planted", page_size=16), model, cpu)
        self.assertEqual(good.attention_backend, "planted")
        for config, platform, page, said in (
            (model, cpu, 1, "--page-size 1 is not supported by --attention-backend planted, which takes 16, 64"),
            (model, cuda, 16, "--attention-backend planted needs platform cpu, and this is cuda"),
            (mla, cpu, 16, "--attention-backend planted has no mla attention, which the model needs: use torch_native"),
        ):
            with self.subTest(said), self.assertRaisesRegex(ServerArgsError, said):
                resolved(ServerArgs(attention_backend="planted", page_size=page), config, platform)

    def test_declarations_are_read_from_the_source(self):
        for family in ("gqa", "mla"):
            self.assertEqual({name: one.graphs for name, one in attention_backends(family).items()},
                             {"torch_native": False, "triton": True})  # fmt: skip
        path = Path(self.folder, "computed_backend.py")
        path.write_text(
            textwrap.dedent("""
                NAME = "computed"

                @register_attention_backend(NAME, "gqa", platforms=("cpu",))
                class Computed: ...
            """)
        )
        with self.assertRaisesRegex(ValueError, "computed_backend.py, line 4: .* needs literal arguments"):
            read_source(path)


if __name__ == "__main__":
    unittest.main()
