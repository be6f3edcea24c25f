"""The config of DeepSeek V4: the published spelling and transformers' give one result, and refusals name the key."""

import copy
import json
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

from sglang.srt.arg_groups.plan import LaunchPlan, resolve
from sglang.srt.configs.cache_layout import FULL, SWA, CacheTypes, join
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig, apply_overrides
from sglang.srt.mem_cache.pool_plan import SWA_FULL_TOKENS_RATIO
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

# V4-Flash as its config.json spells it.
FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096,
    "num_hidden_layers": 43, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0], "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                     "beta_slow": 1},
    "max_position_embeddings": 1048576, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
    "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
HOST = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
OPTIONAL = {
    "architectures", "num_key_value_heads", "n_shared_experts", "scoring_func", "topk_method", "norm_topk_prob",
    "num_nextn_predict_layers", "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act", "attention_bias",
    "torch_dtype",
}  # fmt: skip


def changed(**keys):
    return {key: value for key, value in {**copy.deepcopy(FLASH), **keys}.items() if value is not None}


class TestCache(CustomTestCase):
    def test_bytes_of_a_token_of_flash(self):
        """Where the window has a tenth of the tokens, and where all pools have every token."""
        for kv, drafts, everything, tenth in (
            ("float8_e4m3fn", 0, 76_734, 11_182), ("float8_e4m3fn", 1, 124_999, 16_009),
            ("bfloat16", 0, 98_592, 16_051), ("bfloat16", 1, 147_296, 20_921),
        ):  # fmt: skip
            config, types = DeepseekV4Config.from_hf(FLASH), CacheTypes(kv=kv)
            layout = config.cache_layout(1, types, 2 * drafts)
            layout = join([layout, config.draft_layout(1, types)]) if drafts else layout
            full, window = (layout.num_bytes(unit, PAGE_SIZE) / PAGE_SIZE for unit in (FULL, SWA))
            self.assertEqual((int(full + window), int(full + SWA_FULL_TOKENS_RATIO * window)), (everything, tenth))
        pools = {pool.name: (pool.unit, PAGE_SIZE // pool.units_per_row) for pool in layout.pools}
        window = {"swa": (SWA, 256), "c4_state": (SWA, 16), "c4_index_state": (SWA, 16), "c128_state": (SWA, 256)}
        self.assertEqual(pools, {**window, "c4": (FULL, 64), "c4_index": (FULL, 64), "c128": (FULL, 2)})


class TestBothSpellings(CustomTestCase):
    def test_the_published_keys(self):
        config = DeepseekV4Config.from_hf(FLASH)
        self.assertEqual(config.compress_ratios, (0, 0, *(4, 128) * 20, 4))
        self.assertEqual([i for i, hashed in enumerate(config.hash_layers) if hashed], [0, 1, 2])
        self.assertEqual((config.rope.theta, config.rope.rope_type), (10000.0, "default"))
        self.assertEqual((config.compress_rope.theta, config.compress_rope.factor), (160000.0, 16.0))
        self.assertEqual(config.compress_rope.cos_sin_scale, 1.0, "YaRN's magnitude is not applied")
        self.assertTrue(config.shared_expert_swiglu_limit)
        self.assertEqual(config.attention_family, "compressed")

    def test_transformers_writes_the_same(self):
        from transformers import DeepseekV4Config as HfConfig

        keys = {key: value for key, value in copy.deepcopy(FLASH).items() if key not in ("model_type", "architectures")}
        with tempfile.TemporaryDirectory() as folder:
            hf_config = HfConfig(**keys)
            hf_config.architectures = FLASH["architectures"]
            hf_config.save_pretrained(folder)
            written = json.loads((Path(folder) / "config.json").read_text())
            self.assertNotIn("compress_ratios", written)
            self.assertIn("main", written["rope_parameters"])
        self.assertEqual(DeepseekV4Config.from_hf(written), DeepseekV4Config.from_hf(FLASH))

    def test_ratios_without_an_entry_for_the_mtp_layer(self):
        shorter = changed(compress_ratios=FLASH["compress_ratios"][:-1])
        self.assertEqual(DeepseekV4Config.from_hf(shorter), DeepseekV4Config.from_hf(FLASH))

    def test_fewer_layers_cut_every_list(self):
        text = DeepseekV4Config.from_hf(apply_overrides(FLASH, {"num_hidden_layers": 4}))
        self.assertEqual(text.compress_ratios, (0, 0, 4, 128))
        self.assertEqual(text.hash_layers, (True, True, True, False))


class TestRefusals(CustomTestCase):
    def refused(self, word, **keys):
        with self.assertRaises(ConfigError) as caught:
            DeepseekV4Config.from_hf(changed(**keys))
        self.assertIn(word, str(caught.exception))

    def test_every_needed_key_is_missed_by_name(self):
        for key in FLASH.keys() - OPTIONAL:
            with self.subTest(key=key):
                self.refused(key, **{key: None})

    def test_optional_keys_change_nothing(self):
        for key in OPTIONAL:
            keys = {name: value for name, value in FLASH.items() if name != key}
            found = DeepseekV4Config.from_hf(keys)
            self.assertEqual(found.compress_ratios, DeepseekV4Config.from_hf(FLASH).compress_ratios)

    def test_what_is_not_this_model(self):
        for word, keys in (
            ("another model", {"model_type": "deepseek_v41"}),
            ("model_type", {"model_type": "deepseek_v3"}),
            ("compress_ratios", {"compress_ratios": [0, 8] + [4] * 41}),
            ("compress_ratios", {"compress_ratios": [4] * 42}),
            ("compress_ratios", {"compress_ratios": [4] * 44}),
            ("scoring_func", {"scoring_func": "sigmoid"}),
            ("topk_method", {"topk_method": "greedy"}),
            ("n_group", {"n_group": 8}),
            ("num_key_value_heads", {"num_key_value_heads": 8}),
            ("n_shared_experts", {"n_shared_experts": 2}),
            ("norm_topk_prob", {"norm_topk_prob": False}),
            ("num_experts_per_tok", {"num_experts_per_tok": 257}),
            ("index_topk", {"index_topk": 0}),
            ("index_topk", {"index_topk": 2.5}),
            ("o_groups", {"o_groups": 7}),
            ("sliding_window", {"sliding_window": 512}),
            ("qk_rope_head_dim", {"qk_rope_head_dim": 63}),
            ("index_head_dim", {"index_head_dim": 32}),
            ("expert_dtype", {"expert_dtype": "int4"}),
            ("mscale", {"rope_scaling": {**FLASH["rope_scaling"], "mscale": 1.0}}),
            ("rope_scaling.factor", {"rope_scaling": {"type": "yarn"}}),
            ("rope_parameters.compress", {"rope_scaling": None, "rope_parameters": {"main": {"rope_theta": 1e4}}}),
            ("layer_types", {"layer_types": ["sliding_attention"] * 43}),
            ("layer_types", {"compress_ratios": None, "layer_types": ["full_attention"] * 43}),
            ("num_hash_layers", {"mlp_layer_types": ["moe"] * 43}),
            ("mlp_layer_types", {"num_hash_layers": None, "mlp_layer_types": ["dense"] * 43}),
            ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ):
            with self.subTest(word=word, keys=str(keys)[:80]):
                self.refused(word, **keys)

    def test_another_rate_of_transformers(self):
        kinds = ["heavily_compressed_attention"] * 43
        self.refused(
            "compress_rates.heavily", compress_ratios=None, layer_types=kinds, compress_rates={kinds[0]: 64}
        )  # fmt: skip

    def test_ranks_part_the_groups_of_the_output(self):
        config = DeepseekV4Config.from_hf(FLASH)
        self.assertEqual(config.uneven_parts(8, 8), {})
        self.assertEqual(set(config.uneven_parts(16, 1)), {"o_groups"})


class TestSettings(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        (Path(folder) / "config.json").write_text(json.dumps(FLASH))
        cls.model = ModelConfig.from_path(folder)

    def resolved(self, **args):
        plan = LaunchPlan(ServerArgs(model_path=self.model.model_path, random_seed=1, **args), self.model)
        resolve(plan, HOST)
        return plan

    def test_pages_have_the_one_size(self):
        found = self.resolved()
        self.assertEqual(found.args.page_size, 256)
        self.assertIn("page_size: None -> 256 (compressed entries", "\n".join(map(str, found.changes)))
        self.assertEqual(self.resolved(page_size=256).args.page_size, 256)
        self.assertEqual(found.args.chunked_prefill_size % 256, 0)

    def test_settings_that_are_refused(self):
        for word, args in (
            ("--page-size 16 cannot be served: compressed entries and states of the model follow pages of 256", {
                "page_size": 16}),
            ("--chunked-prefill-size 300 is not a multiple of a page", {"chunked_prefill_size": 300}),
            ("--max-total-tokens 100 is less than one page", {"max_total_tokens": 100}),
            ("--attention-backend torch_native has no compressed attention", {"attention_backend": "torch_native"}),
            ("does not divide o_groups 8", {"tp_size": 16}),
            ("--enforce-shared-experts-fusion cannot be served: the shared expert of DeepSeek V4", {
                "enforce_shared_experts_fusion": True}),
        ):  # fmt: skip
            with self.subTest(word=word):
                self.assertIn(word, "\n".join(self.resolved(**args).errors))


if __name__ == "__main__":
    unittest.main()
