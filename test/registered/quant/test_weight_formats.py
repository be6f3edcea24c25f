"""Formats of matrices by module, blocks that are not square, and how the loader brings a matrix's tensors together."""

import unittest
from functools import partial

import torch

from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.quantization import FP8_BLOCKS, BlockShape, QuantConfig, WeightFormat
from sglang.srt.layers.weights import PLAIN, Leaf, ShardedMatrix, ShardSlice
from sglang.srt.models.checkpoint_model import CheckpointModel, CheckpointTensor, WeightLoadError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

OTHER = WeightFormat("other", BlockShape(1, 32), "_scale")


class TestFormats(CustomTestCase):
    def test_the_first_pattern_that_fits_decides(self):
        config = QuantConfig(
            skipped=("gate", r"layers\.0"), by_module=((r"layers\.2\.mlp\.experts", FP8_BLOCKS), ("experts", OTHER))
        )
        for name, expected in (
            ("model.layers.1.mlp.experts", OTHER),
            ("model.layers.2.mlp.experts", FP8_BLOCKS),
            ("model.layers.0.mlp.experts", None),
            ("model.layers.1.mlp.gate", None),
            ("model.layers.1.mlp.shared_experts.down_proj", FP8_BLOCKS),
            ("model.layers.1.self_attn.o_proj", FP8_BLOCKS),
        ):
            self.assertEqual(config.format_of(name), expected, name)

    def test_matrices_of_one_product_have_one_format(self):
        config = QuantConfig(merged={"gate_up_proj": ("gate_proj", "up_proj")}, by_module=(("up_proj", OTHER),))
        with self.assertRaisesRegex(
            ConfigError, "mlp.gate_proj in fp8 and mlp.up_proj in other, which are multiplied as one matrix"
        ):
            config.format_of("mlp.gate_up_proj")
        self.assertEqual(config.format_of("mlp.up_proj"), OTHER)

    def test_blocks_have_rows_and_columns(self):
        block = BlockShape(3, 32)
        self.assertEqual(block.entries((7, 96)), (3, 3))
        self.assertEqual(block.entries((7,)), (7,))
        shards = ShardedMatrix({0: ShardSlice(12, 128, 3, 3, 64, 64), 1: ShardSlice(8, 128, 6, 2, 64, 64, 3)})
        counted = shards.in_blocks(block)
        self.assertEqual((counted.rows, counted.columns), (2, 2))
        self.assertEqual(counted.slices[1], ShardSlice(3, 4, 2, 1, 2, 2, 1))
        self.assertIsNone(shards.in_blocks(BlockShape(32, 3)))
        self.assertIsNone(shards.in_blocks(BlockShape(2, 32)), "a part that begins inside a block of rows")
        self.assertIsNone(shards.in_blocks(BlockShape(3, 128)), "a part that is half a block of columns")
        self.assertTrue(shards.is_split_in_blocks(BlockShape(3, 128)))
        self.assertFalse(shards.is_split_in_blocks(BlockShape(5, 32)))


# A matrix as int8 codes, two to an entry, with a scale for each row and 4 columns; or plain.
CODES = Leaf("", (torch.int8,), BlockShape(1, 2), partner="_scale")
SCALES = Leaf("_scale", (torch.uint8,), BlockShape(1, 4), partner="")


class Collecting(CheckpointModel):
    """A model of two matrices [2, 8] that keeps what it was handed."""

    def __init__(self):
        super().__init__()
        self.taken = {}

    def checkpoint_tensors(self):
        return {
            name: CheckpointTensor((2, 8), partial(self.take, name), leaves=(PLAIN, CODES, SCALES))
            for name in ("a.weight", "b.weight")
        }

    def take(self, name, *tensors):
        self.taken[name] = tensors


class TestLoading(CustomTestCase):
    def setUp(self):
        self.codes = torch.arange(8, dtype=torch.int8).view(2, 4)
        self.scales = torch.arange(4, dtype=torch.uint8).view(2, 2)
        self.plain = torch.ones(2, 8)

    def load(self, *tensors):
        model = Collecting()
        model.load_weights(tensors)
        return model.taken

    def failure(self, *tensors):
        with self.assertRaises(WeightLoadError) as caught:
            self.load(*tensors)
        return str(caught.exception)

    def test_partners_meet_in_any_order(self):
        pair = [("a.weight", self.codes), ("a.weight_scale", self.scales)]
        for tensors in (pair, pair[::-1]):
            taken = self.load(tensors[0], ("b.weight", self.plain), tensors[1])
            self.assertIs(taken["a.weight"][0], self.codes)
            self.assertIs(taken["a.weight"][1], self.scales)
            self.assertEqual(len(taken["b.weight"]), 1)

    def test_what_does_not_fit_a_leaf_is_named(self):
        b = ("b.weight", self.plain)
        codes, scales = ("a.weight", self.codes), ("a.weight_scale", self.scales)
        for tensors, expected in (
            ((codes, b), "missing (1):\n    a.weight_scale"),
            ((scales, b), "missing (1):\n    a.weight"),
            ((codes, scales), "missing (1):\n    b.weight"),
            ((("a.weight", self.plain), scales, b), "a.weight_scale (its tensor is not quantised)"),
            ((("a.weight", self.codes.view(4, 2)), scales, b), "a.weight: expected shape [2, 4], found [4, 2]"),
            ((codes, ("a.weight_scale", self.scales.view(4, 1)), b), "a.weight_scale: expected shape [2, 2]"),
            ((codes, ("a.weight_scale", self.scales.float()), b), "a.weight_scale: dtype float32 is not supported"),
            ((("a.weight", self.codes.view(torch.uint8)), scales, b), "a.weight: dtype uint8 is not supported"),
            ((codes, scales, scales, b), "given twice (1):\n    a.weight_scale"),
            ((codes, scales, b, ("b.weight_scale_inv", self.scales)), "unexpected (1):\n    b.weight_scale_inv"),
        ):
            with self.subTest(expected):
                self.assertIn(expected, self.failure(*tensors))


if __name__ == "__main__":
    unittest.main()
