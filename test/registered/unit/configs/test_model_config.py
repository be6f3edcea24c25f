"""Model configs against transformers' own classes, both spellings of config.json, and refusals that name every key."""

import copy
import json
import tempfile
import unittest
from pathlib import Path

import torch

from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.errors import ConfigError, ConfigReader
from sglang.srt.configs.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.configs.rope import RopeConfig, read_rope
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

QWEN_MOE = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 48, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "num_experts": 8,
    "num_experts_per_tok": 2, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}  # fmt: skip
_EXPERTS = ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok")
QWEN_DENSE = {**{k: v for k, v in QWEN_MOE.items() if k not in _EXPERTS}, "intermediate_size": 256}
DSV2 = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 2560, "rms_norm_eps": 1e-6,
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64,
                        "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
DSV2G = {**DSV2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
         "q_lora_rank": 48}  # fmt: skip
DSV3 = {**DSV2, "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "q_lora_rank": 48, "num_nextn_predict_layers": 1,
        "rope_parameters": {**DSV2["rope_parameters"], "mscale": 1.0, "mscale_all_dim": 1.0}}  # fmt: skip
# name -> (model_type, architecture, keys)
TINY = {
    "q35moe-ns": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", QWEN_MOE),
    "q35": ("qwen3_5_text", "Qwen3_5ForCausalLM", QWEN_DENSE),
    "dsv2": ("deepseek_v2", "DeepseekV2ForCausalLM", DSV2),
    "dsv2g": ("deepseek_v2", "DeepseekV2ForCausalLM", DSV2G),
    "dsv3": ("deepseek_v3", "DeepseekV3ForCausalLM", DSV3),
}
# Released shapes as their config.json spells them (rope_scaling next to rope_theta).
V3_HUB = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "vocab_size": 129280, "rms_norm_eps": 1e-6, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "hidden_act": "silu", "rope_theta": 10000,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "eos_token_id": 1, "bos_token_id": 0,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
V2_LITE_HUB = {
    **V3_HUB, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "num_hidden_layers": 27, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
    "vocab_size": 102400, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None,
    "rope_scaling": {**V3_HUB["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


class ConfigFolderTestCase(CustomTestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def folder(self, config, generation=None):
        path = self.root / f"m{len(list(self.root.iterdir()))}"
        path.mkdir()
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        return str(path)

    def refusal(self, config, **kwargs):
        with self.assertRaises(ConfigError) as caught:
            ModelConfig.from_path(self.folder(config), **kwargs)
        return str(caught.exception)


class TestAgainstTransformers(ConfigFolderTestCase):
    def saved(self, name):
        """(folder as transformers writes it, the transformers config)"""
        from transformers import AutoConfig

        model_type, architecture, keys = TINY[name]
        config = AutoConfig.for_model(model_type, **copy.deepcopy(keys))
        config.architectures = [architecture]
        path = self.root / name
        config.save_pretrained(path)
        return str(path), config

    def hub_style(self, name):
        model_type, architecture, keys = copy.deepcopy(TINY[name])
        rope = keys.pop("rope_parameters")
        keys["rope_theta"] = rope.pop("rope_theta")
        keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor", None)
        rope["type"] = rope.pop("rope_type")
        keys["rope_scaling"] = None if rope["type"] == "default" else rope
        return {**keys, "architectures": [architecture], "model_type": model_type}

    def test_saved_and_hub_spelling_read_alike_and_as_transformers(self):
        for name in TINY:
            with self.subTest(name):
                path, truth = self.saved(name)
                saved = ModelConfig.from_path(path)
                hub = ModelConfig.from_path(self.folder(self.hub_style(name)))
                self.assertEqual(saved.text, hub.text)
                self.assertEqual(saved.architecture, TINY[name][1])
                skipped = {"rope", "layer_types", "partial_rotary_factor"}
                for field in saved.text.__dataclass_fields__:
                    if field not in skipped and hasattr(truth, field):
                        self.assertEqual(getattr(saved.text, field), getattr(truth, field), field)
                self.assertEqual(saved.text.rope.theta, truth.rope_parameters["rope_theta"])
                if name.startswith("q35"):
                    self.assertEqual(list(saved.text.layer_types), truth.layer_types)
                    self.assertEqual(saved.text.rotary_dim, 16)

    def test_transformers_file_lost_the_interval(self):
        path, _ = self.saved("q35")
        self.assertNotIn("full_attention_interval", json.loads((Path(path) / "config.json").read_text()))
        text = ModelConfig.from_path(path).text
        self.assertEqual(text.full_attention_layer_ids, (3,))
        self.assertEqual(text.linear_layer_ids, (0, 1, 2))

    def test_yarn_and_softmax_scale_as_transformers_computes_them(self):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

        for mscale, all_dim in ((1.0, 1.0), (0.707, 1.0)):
            name = "dsv3"
            path, truth = self.saved(name)
            overrides = {"rope_parameters": {**DSV3["rope_parameters"], "mscale": mscale, "mscale_all_dim": all_dim}}
            truth.rope_parameters.update(overrides["rope_parameters"])
            ours = ModelConfig.from_path(path, json_model_override_args=overrides).text
            _, scale = ROPE_INIT_FUNCTIONS["yarn"](truth, torch.device("cpu"))
            self.assertAlmostEqual(ours.rope.cos_sin_scale, scale, places=12)
            truth._attn_implementation = "eager"
            self.assertAlmostEqual(ours.softmax_scale, DeepseekV3Attention(truth, 0).scaling, places=12)

    def test_v3_router_keys_that_transformers_does_not_write(self):
        from transformers import AutoConfig

        path = self.root / "plain-v3"
        config = AutoConfig.for_model("deepseek_v3")
        config.architectures = ["DeepseekV3ForCausalLM"]
        config.save_pretrained(path)
        self.assertNotIn("scoring_func", json.loads((path / "config.json").read_text()))
        text = ModelConfig.from_path(str(path)).text
        self.assertEqual((text.scoring_func, text.topk_method), ("sigmoid", "noaux_tc"))

    def test_conditional_generation_folder(self):
        from transformers import AutoConfig

        for model_type, architecture, keys in (
            ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", QWEN_MOE),
            ("qwen3_5", "Qwen3_5ForConditionalGeneration", QWEN_DENSE),
        ):
            path = self.root / model_type
            config = AutoConfig.for_model(model_type, text_config=copy.deepcopy(keys))
            config.architectures = [architecture]
            config.save_pretrained(path)
            model = ModelConfig.from_path(str(path))
            self.assertEqual(model.text, Qwen3_5Config.from_hf(keys))


class TestReleasedShapes(ConfigFolderTestCase):
    def test_softmax_scales_of_released_models(self):
        self.assertAlmostEqual(DeepseekConfig.from_hf(V3_HUB).softmax_scale, 0.135234, places=6)
        self.assertAlmostEqual(DeepseekConfig.from_hf(V2_LITE_HUB).softmax_scale, 0.114721, places=6)

    def test_moe_layers(self):
        config = DeepseekConfig.from_hf({**V3_HUB, "moe_layer_freq": 2})
        self.assertEqual([i for i in range(8) if config.is_moe_layer(i)], [4, 6])
        dense = DeepseekConfig.from_hf({**V3_HUB, "n_routed_experts": None})
        self.assertFalse(any(dense.is_moe_layer(i) for i in range(61)))

    def test_serving_fields(self):
        path = self.folder(V3_HUB, {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.95, "do_sample": True})
        with self.assertLogs("sglang.srt.configs.model_config", "INFO") as logs:
            model = ModelConfig.from_path(path, context_length=4096)
        self.assertEqual(model.eos_token_ids, (7, 9, 1))
        self.assertEqual(model.generation_defaults, {"temperature": 0.6, "top_p": 0.95})
        self.assertEqual((model.context_len, model.dtype), (4096, torch.float32))
        self.assertIn("bfloat16", logs.output[0])
        on_gpu = ModelConfig.from_path(path, platform_kind="hip")
        self.assertEqual((on_gpu.dtype, on_gpu.context_len), (torch.bfloat16, 163840))
        self.assertEqual(ModelConfig.from_path(path, dtype="half").dtype, torch.float16)
        self.assertEqual(ModelConfig.from_path(self.folder(V3_HUB)).eos_token_ids, (1,))

    def test_rope_spellings(self):
        self.assertEqual(read_rope(ConfigReader({"rope_theta": 5e5})), RopeConfig(theta=5e5))
        yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7}
        rope = read_rope(ConfigReader({"rope_parameters": yarn, "max_position_embeddings": 1024}))
        self.assertEqual(rope.original_max_position_embeddings, 1024)
        self.assertAlmostEqual(rope.cos_sin_scale, 1.1386294361119891, places=12)


class TestOverrides(ConfigFolderTestCase):
    def test_layers_are_cut_together(self):
        keys = {**QWEN_MOE, "architectures": ["Qwen3_5MoeForCausalLM"]}
        keys["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
        model = ModelConfig.from_path(self.folder(keys), json_model_override_args={"num_hidden_layers": 2})
        self.assertEqual(model.text.layer_types, ("linear_attention",) * 2)

    def test_key_of_the_text_part(self):
        outer = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": dict(QWEN_MOE)}
        for overrides in ({"num_experts": 4}, {"text_config": {"num_experts": 4}}):
            model = ModelConfig.from_path(self.folder(outer), json_model_override_args=overrides)
            self.assertEqual((model.text.num_experts, model.text.hidden_size), (4, 128))

    def test_one_rope_spelling_replaces_the_other_and_keeps_the_base(self):
        keys = {**QWEN_DENSE, "architectures": ["Qwen3_5ForCausalLM"]}
        overrides = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}
        text = ModelConfig.from_path(self.folder(keys), json_model_override_args=overrides).text
        self.assertEqual((text.rope.rope_type, text.rope.theta, text.rotary_dim), ("yarn", 1e7, 16))

    def test_unknown_key_names_its_neighbour(self):
        message = self.refusal(V3_HUB, json_model_override_args={"num_hiden_layers": 2})
        self.assertIn("did you mean num_hidden_layers?", message)

    def test_quantization_can_be_nulled_for_dummy_weights(self):
        config = {**V3_HUB, "quantization_config": {"quant_method": "fp8"}}
        overrides = {"quantization_config": None, "num_hidden_layers": 4}
        model = ModelConfig.from_path(self.folder(config), json_model_override_args=overrides)
        self.assertEqual(model.num_hidden_layers, 4)


class TestRefusals(ConfigFolderTestCase):
    def test_every_missing_and_ill_typed_key_and_the_file(self):
        config = {k: v for k, v in V3_HUB.items() if k not in ("hidden_size", "kv_lora_rank", "routed_scaling_factor")}
        config.update(vocab_size="129280", num_hidden_layers=True, rms_norm_eps=None, v_head_dim=0)
        message = self.refusal(config)
        self.assertIn("config.json", message)
        for key in ("hidden_size", "kv_lora_rank", "routed_scaling_factor"):
            self.assertIn(f"key {key} is missing", message)
        self.assertIn("key rms_norm_eps is null", message)
        for key in ("vocab_size", "num_hidden_layers", "v_head_dim"):
            self.assertIn(f"key {key} must be an integer", message)
        self.assertEqual(message.count("\n"), 7)

    def test_qwen_keys(self):
        config = {k: v for k, v in QWEN_MOE.items() if k not in ("full_attention_interval", "head_dim")}
        message = self.refusal({**config, "architectures": ["Qwen3_5MoeForCausalLM"]})
        self.assertIn("layer_types", message)
        self.assertIn("key head_dim is missing", message)

    def test_one_reason_each(self):
        v3, q35 = V3_HUB, {**QWEN_DENSE, "architectures": ["Qwen3_5ForCausalLM"]}
        rope, outer = v3["rope_scaling"], {"architectures": q35["architectures"]}
        cases = (
            ({**v3, "architectures": ["LlamaForCausalLM"]}, ", ".join(SUPPORTED_ARCHITECTURES)),
            ({**v3, "architectures": None}, "architectures"),
            ({**v3, "quantization_config": {"quant_method": "fp8"}}, "weight_block_size must be [128, 128]"),
            ({**v3, "quantization_config": {"quant_method": "awq"}}, "(awq): such checkpoints are not supported"),
            ({**v3, "topk_method": "greedy"}, "'sigmoid' with topk_method 'greedy'"),
            ({**v3, "n_group": 7}, "not a multiple of n_group"),
            ({**v3, "num_experts_per_tok": 200}, "exceeds the 128 experts"),
            ({**v3, "rope_scaling": {**rope, "type": "longrope"}}, "rope_scaling.rope_type"),
            ({**v3, "rope_scaling": {**rope, "attention_factor": 1.2}}, "attention_factor"),
            ({**v3, "rope_scaling": {k: x for k, x in rope.items() if k != "mscale"}}, "given together"),
            ({**v3, "rope_scaling": {k: x for k, x in rope.items() if k != "type"}}, "needs rope_type yarn"),
            ({**v3, "rope_theta": None}, "rope_theta is missing"),
            ({**v3, "hidden_act": "gelu"}, "hidden_act"),
            ({**v3, "torch_dtype": "float8"}, "pass --dtype"),
            ({**q35, "layer_types": ["full_attention"] * 3}, "3 entries but num_hidden_layers is 4"),
            ({**q35, "layer_types": ["sliding_attention"] * 4}, "layer_types"),
            ({**q35, "attn_output_gate": False}, "attn_output_gate"),
            ({**q35, "linear_num_value_heads": 5}, "not a multiple of linear_num_key_heads"),
            ({**q35, "rope_parameters": [1]}, "rope_parameters must be an object"),
            ({**outer, "text_config": 3}, "text_config must be an object"),
            ({**outer, "text_config": q35, "tie_word_embeddings": True}, "make them equal"),
            ("{not json", "not valid JSON"),
            ("[]", "must hold a JSON object"),
        )
        for config, reason in cases:
            with self.subTest(reason):
                message = self.refusal(config, platform_kind="hip")
                self.assertIn(reason, message)
                self.assertIn("config.json", message)
                self.assertNotIn("\n", message)

    def test_paths_and_arguments(self):
        with self.assertRaisesRegex(ConfigError, "unknown model path 'deepseek-ai/DeepSeek-V3'.*hub"):
            ModelConfig.from_path("deepseek-ai/DeepSeek-V3")
        with self.assertRaisesRegex(ConfigError, "has no config.json"):
            ModelConfig.from_path(str(self.root))
        self.assertIn("exceeds max_position_embeddings 163840", self.refusal(V3_HUB, context_length=200000))
        self.assertIn("--dtype fp8", self.refusal(V3_HUB, dtype="fp8"))
        with self.assertRaisesRegex(ConfigError, "generation_config.json: key temperature must be a number"):
            ModelConfig.from_path(self.folder(V3_HUB, {"temperature": "hot"}))


if __name__ == "__main__":
    unittest.main()
