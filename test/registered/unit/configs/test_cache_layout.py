"""Cache layouts: what the served models keep, by hand, and the pools of a model with three units and byte pages."""

import unittest

from sglang.srt.configs.cache_layout import FULL, STATE, SWA, BufferSpec, CacheLayout, CacheTypes, PoolSpec, join
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.published_sizes import DEEPSEEK_V3, qwen35_like
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

PAGE = 256


class TestServedModels(CustomTestCase):
    def test_latent_rows(self) -> None:
        text = DeepseekConfig.from_hf({**DEEPSEEK_V3, "num_hidden_layers": 61})
        layout = text.cache_layout(8, CacheTypes(kv="bfloat16"))
        self.assertEqual(layout.units, (FULL,))
        self.assertEqual(layout.num_bytes(FULL, 1), 61 * 576 * 2)  # every rank holds the whole row
        self.assertEqual((layout.has(STATE), layout.num_bytes(STATE, 9)), (False, 0))

    def test_keys_values_and_states(self) -> None:
        """Qwen3.5-35B-like: 10 layers of 2 KV heads of 256, and 30 of 48 KiB convolution (bf16) and 2 MiB state."""
        text = Qwen3_5Config.from_hf(qwen35_like(40)["text_config"])
        types = CacheTypes(kv="float8_e4m3fn", conv="bfloat16")
        layout = text.cache_layout(1, types)
        self.assertEqual(layout.units, (FULL, STATE))
        self.assertEqual(layout.num_bytes(FULL, 1), 10 * 2 * 2 * 256)
        self.assertEqual(layout.num_bytes(STATE, 1), 30 * (48 * 1024 + 2 * 1024 * 1024))
        half = CacheTypes(kv="float8_e4m3fn", conv="bfloat16", state="bfloat16")
        self.assertEqual(text.cache_layout(4, half).num_bytes(STATE, 1), 30 * (12 * 1024 + 256 * 1024))
        # Four ranks share two KV heads: each of them holds one.
        self.assertEqual(text.cache_layout(4, types).num_bytes(FULL, 1), 10 * 2 * 256)

    def test_a_draft_layer_is_one_more_layer_of_the_same_pool(self) -> None:
        for text in (DeepseekConfig.from_hf(DEEPSEEK_V3), Qwen3_5Config.from_hf(qwen35_like(4)["text_config"])):
            plain, drafted = text.cache_layout(), join([text.cache_layout(), text.draft_layout()])
            self.assertEqual(drafted.pools[0].layer_ids, (*plain.pools[0].layer_ids, text.num_hidden_layers))
            self.assertEqual(drafted.pools[1:], plain.pools[1:])
            row = drafted.num_bytes(FULL, 1) - plain.num_bytes(FULL, 1)
            self.assertEqual(row * len(plain.pools[0].layer_ids), plain.num_bytes(FULL, 1))

    def test_models_side_by_side_need_what_each_needs(self) -> None:
        """Their layers have the same numbers, and pools of the same name may have other rows."""
        text, other = (DeepseekConfig.from_hf({**DEEPSEEK_V3, "kv_lora_rank": rank}) for rank in (512, 256))
        hybrid = Qwen3_5Config.from_hf(qwen35_like(4)["text_config"])
        parts = [each.cache_layout() for each in (text, hybrid, other, text)]
        for unit in (FULL, STATE):
            self.assertEqual(join(parts).num_bytes(unit, 3), sum(part.num_bytes(unit, 3) for part in parts))
        self.assertEqual(join(parts[:1]), parts[0])

    def test_rows_of_a_verify_step_are_kept_as_inputs(self) -> None:
        """Qwen3.5-35B-like, 4 rows: 32 channels of 256 and 2 gates of 32 heads each, where states would be 129 times
        as much."""
        text = Qwen3_5Config.from_hf(qwen35_like(40)["text_config"])
        types = CacheTypes(kv="bfloat16", conv="bfloat16", inputs="bfloat16")
        for tp_size in (1, 2):
            plain, drafted = (text.cache_layout(tp_size, types, tokens) for tokens in (0, 4))
            tail = drafted.num_bytes(STATE, 1) - plain.num_bytes(STATE, 1)
            self.assertEqual(tail, 30 * (4 * 2 * (8192 + 64) // tp_size + 8))
            self.assertGreater(4 * plain.num_bytes(STATE, 1), 120 * tail)
            self.assertEqual(drafted.pools[:-1], plain.pools)
        dense = DeepseekConfig.from_hf(DEEPSEEK_V3)
        self.assertEqual(dense.cache_layout(1, types, 4), dense.cache_layout(1, types))


class TestThreeUnits(CustomTestCase):
    def test_pages_of_bytes_and_rings_follow_two_allocators(self) -> None:
        """The published layout of DeepSeek V4 Flash: 43 layers, 21 with a row per 4 tokens and 20 with one per 128."""

        def pool(name: str, unit: str, layers: int, shape: tuple[int, ...], dtype: str = "uint8") -> PoolSpec:
            return PoolSpec(name, unit, tuple(range(layers)), (BufferSpec(name, shape, dtype),), PAGE)

        layout = CacheLayout((
            pool("window", SWA, 43, (149760,)),
            pool("c4", FULL, 21, (37440,)),
            pool("c128", FULL, 20, (1728,)),
            pool("indexer", FULL, 21, (8448,)),
            pool("c4 state", SWA, 21, (8, 2048), "float32"),
            pool("indexer state", SWA, 21, (8, 512), "float32"),
            pool("c128 state", SWA, 20, (128, 1024), "float32"),
        ))  # fmt: skip
        self.assertEqual(layout.units, (SWA, FULL))
        self.assertAlmostEqual(layout.num_bytes(FULL, PAGE) / PAGE / 1024, 3.85, delta=0.1)  # KiB per token
        states = 21 * 8 * (8 + 2) * 1024 + 20 * 128 * 4096
        self.assertEqual(layout.num_bytes(SWA, PAGE), 43 * 149760 + states)
        with self.assertRaisesRegex(ValueError, "no whole rows of c4, c128, indexer"):
            layout.num_bytes(FULL, 100)


if __name__ == "__main__":
    unittest.main()
