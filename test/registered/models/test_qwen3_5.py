"""Qwen3.5 without a reference model: which tensors it takes, what it refuses, and its switches."""

import json
import tempfile
import unittest
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan, plan_streams
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.layers.attention.hybrid_linear_attn_backend import GDNBackend
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch, StepKind
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models import qwen3_5
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.platforms import override_platform
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.srt.utils.multi_stream_utils import OverlapSite
from sglang.test.cache_pools import state_slots
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.happens_before import FakeStreamPlatform
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

ARCHITECTURES = {
    "Qwen3_5ForCausalLM": "q35",
    "Qwen3_5ForConditionalGeneration": "q35",
    "Qwen3_5MoeForCausalLM": "q35moe",
    "Qwen3_5MoeForConditionalGeneration": "q35moe",
}


class TestQwen35(CustomTestCase):
    def setUp(self):
        torch.set_num_threads(1)
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def config_folder(self, architecture, **overrides):
        text = {**TINY_CONFIGS[ARCHITECTURES[architecture]], **overrides}
        config = {"text_config": text} if "Conditional" in architecture else text
        folder = Path(self.folder) / f"{architecture}-{len(list(Path(self.folder).iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        return str(folder)

    def build(self, architecture, streams=NO_OVERLAP, **overrides):
        config = ModelConfig.from_path(self.config_folder(architecture, **overrides))
        with override_server_args():
            return load_model(config, "dummy", streams=streams)

    def test_each_architecture_string_gives_a_model_with_a_head(self):
        for architecture, name in ARCHITECTURES.items():
            model = self.build(architecture)
            self.assertEqual(tuple(model.lm_head.weight.shape), (512, 128))
            has_experts = hasattr(model.model.layers[0].mlp, "experts")
            self.assertEqual(has_experts, name == "q35moe")
            self.assertEqual(model.num_fused_shared_experts, int(has_experts))

    def test_dummy_weights_give_lively_logits(self):
        harness = ModelHarness(self.config_folder("Qwen3_5MoeForCausalLM"), num_slots=256, load_format="dummy")
        tokens = list(range(3, 73))
        logprobs = harness.extend([(harness.new_request(), tokens)])[0]
        self.assertTrue(bool(logprobs.isfinite().all()))
        self.assertGreater(float(logprobs.std()), 0.3)

    def test_heads_are_prepared_alike_in_one_op_and_by_overlapping_norms(self):
        harness = ModelHarness(self.config_folder("Qwen3_5ForCausalLM"), num_slots=256, load_format="dummy")
        layers = [layer.self_attn for layer in harness.model.model.layers if hasattr(layer, "self_attn")]
        found = []
        for separate in (False, True):
            harness.reset()
            request = harness.new_request()
            with ExitStack() as stack:
                calls = []
                for layer in layers:
                    stack.enter_context(mock.patch.object(layer.overlap, "covers", return_value=separate))
                    stack.enter_context(mock.patch.object(layer.overlap, "_alt_stream", None))
                    norm = mock.patch.object(layer, "_apply_qk_norm", wraps=layer._apply_qk_norm)
                    calls.append(stack.enter_context(norm))
                rows = harness.extend([(request, list(range(3, 40)))]) + harness.decode([(request, 7)])
            found.append(torch.cat(rows))
            self.assertEqual([call.call_count for call in calls], [int(separate)] * len(layers))
        self.assertTrue(layers and torch.equal(*found))

    def test_norms_leave_the_one_launch_only_where_they_overlap(self):
        """Prefill steps, servers without graphs, and sizes outside of the site's range keep it with the variable set.

        A decode step that is not captured takes the form of the captured one: replay and eager step must be equal.
        """
        platform = FakeStreamPlatform("hip", capturing=False)
        site = OverlapSite(qwen3_5.QK_NORM, enabled=True, max_tokens=2)
        streams = StreamPlan((site,))
        with override_platform(platform):
            folder = self.config_folder("Qwen3_5ForCausalLM")
            harness = ModelHarness(folder, num_slots=256, load_format="dummy", streams=streams)
            layer = harness.model.model.layers[3].self_attn
            self.assertTrue(layer.use_alt_stream)
            requests = [harness.new_request() for _ in range(3)]
            with mock.patch.object(layer, "_apply_qk_norm", wraps=layer._apply_qk_norm) as norms:
                harness.extend([(request, [3, 4, 5]) for request in requests])
                harness.extend([(requests[0], [6])])
                self.assertEqual(norms.call_count, 0)
                for calls, platform.capturing in ((1, False), (2, True)):
                    harness.decode([(requests[0], 7)])
                    self.assertEqual(norms.call_count, calls)
                harness.decode([(request, 7) for request in requests])
                self.assertEqual(norms.call_count, 2)
            with override_server_args(disable_cuda_graph=True):
                config = ModelConfig.from_path(folder)
                self.assertFalse(load_model(config, "dummy", streams=streams).model.layers[3].self_attn.use_alt_stream)

    def test_the_names_of_switches_say_the_platform(self):
        for kind, sites in (("hip", "qwen3_5.shared_experts=on"), ("cuda", ""), ("cuda", "qwen3_5.shared_experts=off")):
            with override_platform(FakeStreamPlatform(kind)), envs.SGLANG_STREAM_SITES.override(sites):
                args = ServerArgs(disable_shared_experts_fusion=True)
                qwen3_5.configure_streams(plan_streams(args))
                layer = self.build("Qwen3_5MoeForCausalLM", plan_streams(args)).model.layers[0]
            enabled = not sites.endswith("off")
            self.assertEqual(qwen3_5._hip_use_alt_stream, kind == "hip")
            self.assertEqual(qwen3_5._cuda_use_alt_stream, kind == "cuda" and enabled)
            self.assertEqual(layer.use_alt_stream, enabled)

    def test_every_problem_of_a_checkpoint_is_named(self):
        model = self.build("Qwen3_5MoeForConditionalGeneration")
        tensors = dict(iterate_dummy(model, 0))
        gone = "model.layers.0.linear_attn.in_proj_z.weight"
        misshapen = "model.layers.1.linear_attn.A_log"
        tensors.pop(gone)
        tensors[misshapen] = torch.ones(5)
        tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"] = torch.ones(1)
        with self.assertRaises(WeightLoadError) as caught:
            model.load_weights(tensors.items())
        for name in (gone, misshapen, "model.layers.0.linear_attn.in_proj_qkvz.weight", "[4]", "[5]"):
            self.assertIn(name, str(caught.exception))

    def test_draft_head_vision_and_layers_cut_off_are_left_alone(self):
        model = self.build("Qwen3_5ForConditionalGeneration")
        tensors = dict(iterate_dummy(model, 0))
        longer = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
        extra = ("mtp.layers.0.mlp.gate.weight", "model.visual.blocks.0.norm.weight")
        cut = "model.language_model.layers.4.input_layernorm.weight"
        model.load_weights({**longer, **dict.fromkeys((*extra, cut), torch.ones(1))}.items())
        with self.assertRaisesRegex(WeightLoadError, "model.language_model.layers.3.surprise"):
            model.load_weights({**longer, "model.language_model.layers.3.surprise": torch.ones(1)}.items())

    def test_tied_embeddings_need_no_head_in_the_file(self):
        model = self.build("Qwen3_5ForCausalLM", tie_word_embeddings=True)
        self.assertIs(model.lm_head.weight, model.model.embed_tokens.weight)
        tensors = dict(iterate_dummy(model, 0))
        self.assertNotIn("lm_head.weight", tensors)
        model.load_weights({**tensors, "lm_head.weight": torch.ones(1)}.items())

    def test_decay_parameter_stays_float32_in_a_half_precision_model(self):
        config = ModelConfig.from_path(self.config_folder("Qwen3_5ForCausalLM"), dtype="bfloat16")
        with override_server_args():
            mixer = load_model(config, "dummy").model.layers[0].linear_attn
        self.assertEqual((mixer.A_log.dtype, mixer.norm.weight.dtype), (torch.float32, torch.bfloat16))

    def test_layers_copy_the_stream_switches_when_they_are_built(self):
        self.assertFalse(qwen3_5._hip_use_alt_stream or qwen3_5._gdn_use_alt_stream or qwen3_5._qknorm_use_alt_stream)
        before = self.build("Qwen3_5ForCausalLM").model.layers
        site = OverlapSite(qwen3_5.GDN_QKVZ_BA, enabled=True)
        sites = tuple(site if site.name == other.name else other for other in NO_OVERLAP.sites)
        after = self.build("Qwen3_5ForCausalLM", StreamPlan(sites)).model.layers
        self.assertTrue(qwen3_5._gdn_use_alt_stream)
        self.assertFalse(before[0].linear_attn.use_alt_stream)
        self.assertTrue(after[0].linear_attn.use_alt_stream)
        self.assertFalse(after[0].use_alt_stream or after[3].self_attn.use_alt_stream)

    def test_shared_expert_fusion_follows_the_arguments_in_force_when_the_model_is_built(self):
        for disabled in (True, False):
            config = ModelConfig.from_path(self.config_folder("Qwen3_5MoeForCausalLM"))
            with override_server_args(disable_shared_experts_fusion=disabled):
                block = load_model(config, "dummy").model.layers[0].mlp
            self.assertEqual(block.support_shared_expert_fusion, not disabled)
            self.assertEqual(block.num_fused_shared_experts, int(not disabled))

    def test_large_steps_project_like_small_ones(self):
        mixer = self.build("Qwen3_5ForCausalLM").model.layers[0].linear_attn
        hidden = torch.randn(qwen3_5.DUAL_STREAM_TOKEN_THRESHOLD, 128)
        with torch.inference_mode():
            large, small = mixer._forward_input_proj(hidden), mixer._forward_input_proj(hidden[:-1])
        for one, other in zip(large, small, strict=True):
            torch.testing.assert_close(one[:-1], other)


class TestGDNBackendRefusals(CustomTestCase):
    def batch(self, kind, slots):
        places = torch.arange(1, 1 + kind.rows_per_request)
        batch = ModelWorkerBatch.uniform(kind, [0], [kind.rows_per_request], places, slots)
        return ForwardBatch.from_worker_batch(batch, torch.device("cpu"), None)

    def test_a_batch_without_state_slots_is_refused(self):
        _, pool = state_slots(2, (0,), (6, 3), (1, 2, 2), torch.float32, torch.float32)
        backend = GDNBackend(pool, torch.device("cpu"))
        with self.assertRaisesRegex(ValueError, "1 requests, none given"):
            backend.plan_states(self.batch(DECODE, None))
        with self.assertRaisesRegex(ValueError, "1 requests, 2 given"):
            backend.plan_states(self.batch(DECODE, [1, 2]))
        with self.assertRaisesRegex(NotImplementedError, "no plan for a verify step of 2 rows"):
            backend.plan_states(self.batch(StepKind("verify", 2), [1]))


if __name__ == "__main__":
    unittest.main()
