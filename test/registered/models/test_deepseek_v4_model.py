"""DeepSeek V4's model over plain tensors instead of pools, against transformers; its checkpoints, in both spellings."""

import gc
import math
import re
import tempfile
import unittest

import torch
from safetensors.torch import load_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import build_model, load_model
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM
from sglang.srt.server_args import override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_truth import PlainCompressedBackend
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

# Past the window, and past the first entry of 128 tokens.
LENGTH = 150


def published(name):
    """transformers' saved name as the published checkpoints have it."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
    return re.sub(r"\.attn\.norm\.", ".attn.kv_norm.", name)


class TestDeepseekV4Model(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.path = cls.enterClassContext(tempfile.TemporaryDirectory())
        hf_model = save_tiny_checkpoint("dsv4", cls.path, num_hidden_layers=4)
        cls.prompt = torch.randint(0, 512, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
        with torch.no_grad():
            cls.truth = hf_model(torch.tensor([cls.prompt])).logits[0].log_softmax(-1)
        backend = PlainCompressedBackend(hf_model.config.sliding_window, hf_model.config.index_topk)
        cls.harness = ModelHarness(cls.path, page_size=256, backend=backend)
        cls.tensors = load_file(f"{cls.path}/model.safetensors")

    def load(self, tensors, **formats):
        """A model of ``tensors``, by name."""
        config = ModelConfig.from_path(self.path, **formats)
        with override_server_args():
            model = build_model(config, "cpu")
        model.load_weights(tensors.items() if isinstance(tensors, dict) else tensors)
        return model

    def assert_close(self, found):
        self.assertEqual(found.shape, self.truth.shape)
        self.assertLess((found - self.truth).abs().max().item(), 1e-4)

    def test_the_truth_is_not_flat(self):
        self.assertGreater(self.truth.std().item(), 0.3)

    def test_prefill_and_chunks(self):
        for size in (LENGTH, 64, 7):
            with self.subTest(size=size):
                self.assert_close(self.harness.extend_in_chunks(self.harness.new_request(), self.prompt, size))

    def test_decode(self):
        request, head = self.harness.new_request(), LENGTH - 24
        rows = list(self.harness.extend([(request, self.prompt[:head])]))
        rows += [self.harness.decode([(request, token)])[0] for token in self.prompt[head:]]
        self.assert_close(torch.cat(rows))

    def test_a_step_without_requests(self):
        self.assertEqual(tuple(self.harness.idle().next_token_logits.shape), (0, 512))

    def test_the_published_names_in_any_order(self):
        wanted = dict(self.harness.model.named_parameters())
        official = {published(name): tensor for name, tensor in self.tensors.items()}
        self.assertIn("layers.0.attn.kv_norm.weight", official)
        self.assertIn("hc_head_fn", official)
        drafts = {"mtp.0.e_proj.weight": torch.ones(2, 2), "mtp.0.attn.wq_a.scale": torch.ones(1)}
        for names in (sorted(official), sorted(official, reverse=True)):
            model = self.load([(name, official[name]) for name in names] + list(drafts.items()))
            for name, param in model.named_parameters():
                self.assertTrue(torch.equal(param, wanted[name]), name)

    def test_what_does_not_fit_is_named(self):
        table = "model.layers.0.ffn.gate.tid2eid"
        for name, changes in (
            ("layers.1.attn.extra.weight", {"layers.1.attn.extra.weight": torch.ones(2)}),
            ("layers.0.attn.kv_norm.weight", {"layers.0.attn.kv_norm.weight": torch.ones(64)}),
            ("model.layers.1.self_attn.indexer.compressor.wkv.weight", {
                "model.layers.1.attn.indexer.compressor.wkv.weight": None}),
            ("model.layers.2.mlp.gate.e_score_correction_bias", {"model.layers.2.ffn.gate.bias": None}),
            ("model.layers.3.self_attn.wkv.weight", {"model.layers.3.attn.wkv.weight": None}),
            (table, {table: torch.full((512, 4), 16)}),
            (table, {table: torch.full((512, 4), -1)}),
            (table, {table: self.tensors[table].float()}),
            ("model.layers.0.hc_attn_fn", {"model.layers.0.hc_attn_fn": torch.ones(24, 128)}),
        ):  # fmt: skip
            changed = {key: value for key, value in (self.tensors | changes).items() if value is not None}
            with self.subTest(name=name), self.assertRaisesRegex(WeightLoadError, re.escape(name)):
                self.load(changed)

    def test_sixteen_bits_leave_norms_and_coefficients_in_float32(self):
        model = self.load(self.tensors, dtype="bfloat16")
        wide = re.compile(r"norm|hc_|sinks|position_bias|correction_bias|tid2eid")
        for name, param in model.named_parameters():
            kind = torch.int32 if "tid2eid" in name else torch.float32 if wide.search(name) else torch.bfloat16
            self.assertEqual(param.dtype, kind, name)

    def test_dummy_weights_route_to_experts_that_exist(self):
        with override_server_args():
            model = load_model(ModelConfig.from_path(self.path), "dummy")
        table = model.model.layers[0].mlp.topk.tid2eid
        self.assertEqual((table.min().item(), table.max().item()), (0, 15))

    def test_two_tables_that_go_with_their_model(self):
        """However often models are built and freed, each has its own two tables of angles, and they are right."""
        for theta in (None, 5000.0, None, 7000.0, None):
            rope = {"main": {"rope_theta": theta}, "compress": {"rope_theta": theta}}
            overrides = {} if theta is None else {"rope_parameters": rope}
            config = ModelConfig.from_path(self.path, json_model_override_args=overrides)
            with override_server_args():
                model = DeepseekV4ForCausalLM(config)
            tables = [buffer for name, buffer in model.named_buffers() if "cos_sin" in name]
            self.assertEqual(len(tables), 2)
            for layer, ratio in zip(model.model.layers, config.text.compress_ratios, strict=True):
                table = layer.self_attn.rotary_emb.cos_sin_cache
                self.assertIs(table, tables[int(ratio > 0)])
                # The second pair of columns of position 1: one step of the base, stretched nowhere.
                base = theta or (160000.0 if ratio else 10000.0)
                if theta or not ratio:
                    self.assertAlmostEqual(table[1, 1].item(), math.cos(base ** (-2 / 16)), places=5)
            del model, tables, layer, table
            gc.collect()


if __name__ == "__main__":
    unittest.main()
