"""fp8 weights: configs, block scales under sharding, FNUZ bits, what the loader refuses, saturating cache rows."""

import math
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sglang.srt.layers.quantization.fp8 as fp8_layer
from sglang.kernels.ops.attention.kv_cache import write_kv_torch, write_latent_torch
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8
from sglang.kernels.ops.quant.group_fp8 import (
    FEW_ROWS_TILES,
    LINEAR_TILES,
    ONE_ROW_TILE,
    QuantizedRows,
    block_fp8_linear,
    empty_quantized,
    linear_tile,
    quantize_groups_torch,
)
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig, read_quantization
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.moe.ep_moe.gathered import GatheredMoE
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.quantization import warn_of_splits
from sglang.srt.layers.quantization.fp8 import Fp8Method, quantize_blocks, to_fnuz
from sglang.srt.model_executor.model_pools import cache_layout, kv_dtype
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.server_args import override_server_args
from sglang.test.cache_pools import kv_pools, latent_pools
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import quantize_tiny_checkpoint, save_tiny_checkpoint

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

FP8 = torch.float8_e4m3fn
HF = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
CHECKPOINT = QuantConfig()


class Gfx942(CpuPlatform):
    """A machine whose 8-bit floats are FNUZ."""

    arch = "gfx942"


def dequantized(w, scale):
    """Float64, an element at a time by its block."""
    i, j = torch.arange(w.shape[0]) // 128, torch.arange(w.shape[1]) // 128
    return w.float().double() * scale.double()[i][:, j]


def random_matrix(rows, columns, seed=0):
    """An 8-bit matrix, the scales of its blocks, and its numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator).mul(16).to(FP8)
    scale = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128), generator=generator) + 0.1
    return w, scale, dequantized(w, scale)


def numbers(layer, name="weight"):
    """The dequantized parameter of a layer, in float64."""
    param = getattr(layer, name).data
    if param.dtype.itemsize > 1:
        return param.double()
    return dequantized(param, getattr(layer, f"{name}_scale_inv").data)


class TestConfig(CustomTestCase):
    def test_read(self):
        skipped = ["lm_head", "model.language_model.layers.0.mlp.gate", "in_proj_b"]
        config = read_quantization({"quantization_config": {**HF, "modules_to_not_convert": skipped}}, None)
        self.assertFalse(config.on_load)
        self.assertEqual(read_quantization({"text_config": {"quantization_config": HF}}, "fp8"), QuantConfig())
        self.assertIsNone(read_quantization({"text_config": {}}, None))
        self.assertTrue(read_quantization({}, "fp8").on_load)
        merged = QuantConfig(skipped=config.skipped, merged={"in_proj_ba": ("in_proj_b", "in_proj_a")})
        for name, expected in (
            ("model.layers.0.mlp.gate", True),
            ("model.layers.0.mlp.gate_up_proj", False),
            ("model.layers.10.mlp.gate", False),
            ("model.layers.3.linear_attn.in_proj_ba", True),
            ("model.layers.3.linear_attn.in_proj_qkvz", False),
            ("lm_head", True),
        ):
            self.assertEqual(merged.format_of(name) is None, expected, name)

    def test_everything_else_is_refused_by_name(self):
        cases = (
            ({**HF, "weight_block_size": None}, "weight_block_size must be [128, 128]"),
            ({**HF, "weight_block_size": [64, 128]}, "found [64, 128]"),
            ({**HF, "fmt": "e5m2"}, "fmt"),
            ({**HF, "activation_scheme": "static"}, "activation_scheme"),
            ({**HF, "expert_dtype": "int4"}, "expert_dtype"),
            ({**HF, "modules_to_convert": ["embed"]}, "modules_to_convert"),
            ({**HF, "modules_to_not_convert": ["a", 3]}, "modules_to_not_convert"),
            ({**HF, "modules_to_not_convert": ["("]}, "'(' is no name"),
            *(({"quant_method": method}, f"({method})") for method in ("awq", "gptq", "w8a8_int8", "mxfp4")),
            ({}, "(unknown method)"),
        )
        for settings, reason in cases:
            for asked in (None, "fp8"):
                with self.subTest(reason), self.assertRaises(ConfigError) as caught:
                    read_quantization({"quantization_config": settings}, asked)
                self.assertIn(reason, str(caught.exception))
        with self.assertRaisesRegex(ConfigError, "compression_config"):
            read_quantization({"compression_config": {"quant_method": "fp8"}}, None)


class TestBlocks(CustomTestCase):
    def test_quantised_blocks_against_a_loop(self):
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(200, 300, generator=generator)
        w[:128, 128:256] = 0.0
        w[3, 2], w[130, 299] = 1e4, 1e-30
        q, scale = quantize_blocks(w.bfloat16())
        self.assertEqual((q.dtype, scale.shape), (FP8, (2, 3)))
        for i in range(2):
            for j in range(3):
                block = w.bfloat16().double()[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                wanted = float(block.abs().max()) / 448 or 1.0
                self.assertAlmostEqual(float(scale[i, j]) / wanted, 1.0, places=6)
                found = q[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].double() * wanted
                # Half of the last of 3 bits of fraction; below the least normal number, half of the least number.
                bound = (block.abs() / 16).clamp(min=wanted * 2**-10) * 1.0001
                self.assertTrue(bool(((found - block).abs() <= bound).all()))

    def test_fnuz_keeps_every_number(self):
        codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(FP8)
        w, scale = to_fnuz(codes, torch.full((1, 1), 0.25))
        self.assertEqual(w.dtype, torch.float8_e4m3fnuz)
        torch.testing.assert_close(dequantized(w, scale), codes.double() * 0.25, rtol=0, atol=0, equal_nan=True)
        self.assertEqual(int(codes.float().isnan().sum()), int(w.float().isnan().sum()))


class TestLayers(CustomTestCase):
    def check(self, size, build, matrices, expected):
        """Every rank's weight is its part of the numbers, in blocks, from one 8-bit matrix a shard id."""
        for rank, handle in enumerate(thread_ranks(size)):
            with override_tp_group(handle):
                layer = build()
            for shard_id, (w, scale, _) in matrices.items():
                layer.weight.weight_loader(layer.weight, w, shard_id, scale)
            self.assertEqual(layer.weight.dtype, FP8)
            torch.testing.assert_close(numbers(layer), expected(rank), rtol=0, atol=0)

    def test_shards_at_block_edges_keep_their_scales(self):
        a, b, c = random_matrix(256, 384, 1), random_matrix(512, 384, 2), random_matrix(256, 384, 3)
        self.check(2, lambda: ColumnParallelLinear(384, 512, quant_config=CHECKPOINT), {None: b},
                   lambda rank: b[2].chunk(2)[rank])  # fmt: skip
        self.check(3, lambda: RowParallelLinear(384, 256, quant_config=CHECKPOINT), {None: a},
                   lambda rank: a[2].chunk(3, 1)[rank])  # fmt: skip
        self.check(2, lambda: MergedColumnParallelLinear(384, [256, 512, 256], quant_config=CHECKPOINT),
                   {0: a, 1: b, 2: c}, lambda rank: torch.cat([m[2].chunk(2)[rank] for m in (a, b, c)]))  # fmt: skip
        both = (torch.cat((a[0], b[0])), torch.cat((a[1], b[1])), None)
        self.check(2, lambda: MergedColumnParallelLinear(384, [256, 512, 256], quant_config=CHECKPOINT),
                   {(0, 1): both, 2: c}, lambda rank: torch.cat([m[2].chunk(2)[rank] for m in (a, b, c)]))  # fmt: skip
        # Two ranks share each key head.
        self.check(4, lambda: QKVParallelLinear(384, 128, 4, 2, quant_config=CHECKPOINT), {"q": b, "k": a, "v": c},
                   lambda rank: torch.cat([b[2].chunk(4)[rank], a[2].chunk(2)[rank // 2],
                                           c[2].chunk(2)[rank // 2]]))  # fmt: skip

    def test_a_last_block_may_be_partial(self):
        matrix = random_matrix(200, 256)
        self.check(1, lambda: ColumnParallelLinear(256, 200, quant_config=CHECKPOINT), {None: matrix},
                   lambda rank: matrix[2])  # fmt: skip

    def test_what_is_not_cut_at_blocks_is_scaled_back_and_said(self):
        a, b = random_matrix(192, 320, 1), random_matrix(192, 320, 2)
        with self.assertLogs("sglang.srt.layers.quantization", "WARNING") as logs:
            layer = MergedColumnParallelLinear(320, [192, 192], quant_config=CHECKPOINT, prefix="model.layers.7.x")
        self.assertIn("model.layers.*.x: [384, 320] on this rank is not split at fp8 blocks", logs.output[0])
        for shard_id, (w, scale, _) in enumerate((a, b)):
            layer.weight.weight_loader(layer.weight, w, shard_id, scale)
        torch.testing.assert_close(layer.weight.double(), torch.cat((a[2], b[2])), rtol=1e-6, atol=0)
        plain = ColumnParallelLinear(256, 128, quant_config=CHECKPOINT, dequantize=True)
        self.assertEqual(plain.weight.dtype, torch.float32)

    def test_layers_that_only_the_split_keeps_plain_are_named_once(self):
        # 192 rows per rank: the first rank's begin at a block's edge, the second's do not.
        ranks = thread_ranks(2)
        models = []
        for handle in ranks:
            model = nn.ModuleDict({"layers": nn.ModuleList()})
            with override_tp_group(handle):
                for number in range(2):
                    options = {"quant_config": CHECKPOINT, "prefix": f"layers.{number}.o"}
                    model["layers"].append(nn.ModuleDict({
                        "o": RowParallelLinear(384, 128, **options), "q": ColumnParallelLinear(128, 384, **options),
                        "whole": ColumnParallelLinear(128, 512, **options),
                        "never": RowParallelLinear(320, 128, **options),
                    }))  # fmt: skip
            models.append(model)
        with self.assertLogs("sglang.srt.layers.quantization", "WARNING") as logs:
            found = run_ranks(lambda rank: warn_of_splits(models[rank], ranks[rank]), range(2))
        self.assertEqual(found, [["layers.*.o", "layers.*.q"]] * 2)
        self.assertEqual(len(logs.output), 1)
        self.assertRegex(logs.output[0], r"layers\.\*\.o, layers\.\*\.q: .* --tp-size 1 serves them in 8 bits")

    def test_experts(self):
        matrices = {name: random_matrix(*shape, seed) for seed, (name, shape) in enumerate(
            {"w1": (256, 128), "w3": (256, 128), "w2": (128, 256)}.items())}  # fmt: skip
        for rank, handle in enumerate(thread_ranks(2)):
            with override_tp_group(handle):
                layer = FusedMoE(2, 128, 256, 1, quant_config=CHECKPOINT)
                for name, (w, scale, _) in matrices.items():
                    layer.load_expert(name, 1, w, scale)
            one = SimpleNamespace(**{name: getattr(layer, name)[1] for name in dict(layer.named_parameters())})
            wanted = torch.cat([matrices[name][2].chunk(2)[rank] for name in ("w1", "w3")])
            torch.testing.assert_close(numbers(one, "w13_weight"), wanted, rtol=0, atol=0)
            torch.testing.assert_close(numbers(one, "w2_weight"), matrices["w2"][2].chunk(2, 1)[rank], rtol=0, atol=0)
        self.assertEqual(layer.row_dtype, FP8)
        # Rows that go to other ranks do so as they are.
        self.assertIsNone(GatheredMoE(2, 128, 256, 1, quant_config=CHECKPOINT).row_dtype)
        self.assertTrue(MoriEPMoE.rows_travel)
        sizes = r"\[128, 128\] and \[128, 64\] of an expert"
        with override_tp_group(thread_ranks(4)[0]), self.assertRaisesRegex(ConfigError, sizes):
            FusedMoE(2, 128, 256, 1, quant_config=CHECKPOINT, prefix="model.layers.3.mlp.experts")

    def test_experts_take_the_rows_that_their_kernel_does(self):
        w13, w2 = torch.zeros(2, 256, 256).to(FP8), torch.zeros(2, 256, 128).to(FP8)
        layer = SimpleNamespace(
            w13_weight=w13, w13_weight_scale_inv=None, w2_weight=w2, w2_weight_scale_inv=None, swiglu_limit=None
        )
        plain = torch.randn(3, 256)
        rows = QuantizedRows(*quantize_groups_torch(plain, FP8), plain.dtype, plain)
        by_columns = rows._replace(scale=rows.scale.t().contiguous().t())
        for made, shuffled, wanted in (
            (rows, False, (rows.q, rows.scale)),
            (rows, True, (plain, None)),
            (by_columns, False, (plain, None)),
            (rows._replace(plain=None), True, (rows.q, rows.scale)),  # as they arrive from another rank
        ):
            w13.is_shuffled = shuffled
            with mock.patch.object(fp8_layer, "fused_experts_fp8") as experts:
                Fp8Method(False).apply_moe(layer, made, None, None)
            self.assertIs(experts.call_args.args[0], wanted[0])
            self.assertIs(experts.call_args.args[7], wanted[1])

    def test_kernels_take_scales_only_as_they_read_them(self):
        w, w_scale = torch.zeros(64, 512).to(FP8), torch.ones(1, 4)
        library = next(impl for impl in block_fp8_linear.impls if impl.name == "cublas")
        q, scale = empty_quantized(60, 512, FP8, torch.device("cpu"))
        self.assertEqual((q.shape, scale.shape, scale.stride()), ((60, 512), (60, 4), (1, 64)))
        self.assertTrue(library.accepts(q, w, w_scale, scale, torch.bfloat16))
        self.assertFalse(library.accepts(q, w, w_scale, scale.contiguous(), torch.bfloat16))
        # Room for 48 rows, but of other scales.
        self.assertFalse(library.accepts(q[:40], w, w_scale, scale[:40], torch.bfloat16))
        few = empty_quantized(32, 512, FP8, torch.device("cpu"))
        self.assertTrue(all(part.is_contiguous() for part in few))
        experts = next(impl for impl in fused_experts_fp8.impls if impl.name == "triton")
        stacks = (
            torch.zeros(2, 256, 512).to(FP8),
            torch.ones(2, 2, 4),
            torch.zeros(2, 512, 128).to(FP8),
            torch.ones(2, 4, 1),
        )
        for rows, taken in ((1, False), (2, True)):
            routing = torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int32)
            self.assertEqual(experts.accepts(q[:rows], *stacks, *routing, scale[:rows], torch.bfloat16), taken)

    def test_on_load_and_fnuz(self):
        w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
        wanted = dequantized(*quantize_blocks(w))
        for platform, dtype in ((CpuPlatform(), FP8), (Gfx942(), torch.float8_e4m3fnuz)):
            with override_platform(platform), override_tp_group(thread_ranks(3)[1]):
                layer = RowParallelLinear(384, 256, quant_config=QuantConfig(on_load=True))
                layer.weight.weight_loader(layer.weight, w)
                self.assertEqual(layer.weight.dtype, dtype)
                torch.testing.assert_close(numbers(layer), wanted[:, 128:256], rtol=0, atol=0)
                self.assertIsInstance(layer.quant_method, Fp8Method)


class TestLoader(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        save_tiny_checkpoint("dsv3-k", cls.root / "plain", num_hidden_layers=2, n_routed_experts=8, n_group=2)
        quantize_tiny_checkpoint(cls.root / "plain", cls.root / "fp8")
        cls.tensors = load_file(cls.root / "fp8" / "model.safetensors")
        cls.layer = "model.layers.1.mlp.experts.3.up_proj.weight"

    def load(self, folder="fp8", load_format="auto", **formats):
        with override_server_args():
            return load_model(ModelConfig.from_path(str(self.root / folder), **formats), load_format, seed=1)

    def write(self, tensors):
        """Name of a folder with ``tensors``."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((self.root / "fp8" / "config.json").read_text())
        return folder.name

    def failure(self, **changes):
        """The refusal of a checkpoint with ``changes``, None taking a tensor away."""
        folder = self.write({k: v for k, v in {**self.tensors, **changes}.items() if v is not None})
        with self.assertRaises(WeightLoadError) as caught:
            self.load(folder)
        return str(caught.exception)

    def test_what_does_not_fit_is_named(self):
        name, scale = self.layer, f"{self.layer}_scale_inv"
        self.assertIn(f"missing (1):\n    {scale}", self.failure(**{scale: None}))
        self.assertIn(f"missing (1):\n    {name}", self.failure(**{name: None}))
        self.assertIn(f"{scale}: expected shape [1, 2], found [2, 1]", self.failure(**{scale: torch.ones(2, 1)}))
        self.assertIn(f"{name}: expected shape [128, 256], found [256, 128]",
                      self.failure(**{name: torch.zeros(256, 128).to(FP8)}))  # fmt: skip
        self.assertIn(f"{name}: dtype bfloat16, but config.json says that it is quantised",
                      self.failure(**{name: torch.zeros(128, 256).bfloat16(), scale: None}))  # fmt: skip
        self.assertIn("(its tensor is not quantised)", self.failure(**{name: torch.zeros(128, 256).bfloat16()}))
        self.assertIn(f"{name}: dtype float8_e5m2 is not supported",
                      self.failure(**{name: torch.zeros(128, 256).to(torch.float8_e5m2), scale: None}))  # fmt: skip
        self.assertIn(f"{scale}: dtype uint8 is not supported",
                      self.failure(**{scale: torch.ones(1, 2, dtype=torch.uint8)}))  # fmt: skip
        head = self.tensors["lm_head.weight"].to(FP8)
        self.assertIn("lm_head.weight: dtype float8_e4m3fn is not supported", self.failure(**{"lm_head.weight": head}))
        self.assertIn("unexpected (1):\n    lm_head.weight_scale_inv",
                      self.failure(**{"lm_head.weight_scale_inv": torch.ones(4, 2)}))  # fmt: skip

    def test_scales_that_are_powers_of_two(self):
        """Official checkpoints of DeepSeek V4 keep them as exponents; the same numbers in float32 serve alike."""
        exact, exponents = dict(self.tensors), dict(self.tensors)
        for name, scale in self.tensors.items():
            if name.endswith("_scale_inv"):
                exact[name] = scale.log2().ceil().exp2()
                exponents[name] = exact[name].to(torch.float8_e8m0fnu)
        wanted, found = (dict(self.load(self.write(tensors)).named_parameters()) for tensors in (exact, exponents))
        for name, param in wanted.items():
            self.assertTrue(torch.equal(param.float(), found[name].float()), name)
        least = torch.tensor([[0, 254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        layer = RowParallelLinear(256, 128, quant_config=CHECKPOINT)
        layer.weight.weight_loader(layer.weight, torch.ones(128, 256).to(FP8), None, least)
        self.assertEqual(layer.weight_scale_inv[0].double().log2().tolist(), [-127.0, 127.0])

    def test_scales_of_the_wrong_kind(self):
        name = f"{self.layer}_scale_inv"
        for scale, reason in (
            (torch.tensor([[127, 255]], dtype=torch.uint8).view(torch.float8_e8m0fnu), "its scales contain infinite"),
            (torch.tensor([[1.0, float("inf")]]), "its scales contain infinite numbers or NaN"),
            (torch.tensor([[127, 127]], dtype=torch.uint8), "dtype uint8 is not supported here, only float32"),
            (torch.ones(1, 2).to(FP8), "dtype float8_e4m3fn is not supported here"),
        ):
            self.assertIn(reason, self.failure(**{name: scale}))
        plain = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"
        nan = torch.full_like(self.tensors[plain], torch.nan)
        self.assertIn("kv_b_proj.weight: its scales contain infinite", self.failure(**{plain: nan}))

    def test_on_load_makes_what_a_quantised_checkpoint_holds(self):
        wanted = dict(self.load().named_parameters())
        for name, param in self.load("plain", quantization="fp8").named_parameters():
            if not name.endswith("kv_b_proj.weight"):  # plain in both, and of 8-bit numbers in one alone
                self.assertTrue(torch.equal(param.float(), wanted[name].float()), name)
        for name, param in self.load(quantization="fp8").named_parameters():
            self.assertTrue(torch.equal(param.float(), wanted[name].float()), name)

    def test_healthy_dummy(self):
        model = self.load(load_format="dummy")
        tensors = dict(iterate_dummy(model, seed=1))
        w, scale = tensors[self.layer], tensors[f"{self.layer}_scale_inv"]
        self.assertEqual((w.dtype, tuple(scale.shape)), (FP8, (1, 2)))
        self.assertAlmostEqual(w.float().std().item(), 16.0, delta=0.3)
        self.assertTrue(torch.equal(scale, torch.full((1, 2), 256**-0.5 / 16)))
        for name, param in model.named_parameters():
            self.assertTrue(bool(param.float().isfinite().all()), name)
            self.assertGreater(float(param.float().abs().max()), 0.0, name)


class TestCache(CustomTestCase):
    def test_rows_saturate_and_stay_finite(self):
        rows = torch.tensor([[1e9, -1e9, 449.0, -0.3], [float("inf"), 0.0, 1e-9, float("nan")]])
        for dtype in (FP8, torch.float8_e4m3fnuz):
            most = torch.finfo(dtype).max
            (latent,) = latent_pools(6, 2, dtype, 4, [0])["latent"].layer(0)
            write_latent_torch(rows, latent, torch.tensor([3, 5]))
            found = latent.float()
            self.assertEqual(found[3, :3].tolist(), [most, -most, most])
            self.assertAlmostEqual(found[3, 3].item(), -0.3, delta=0.3 / 16)
            self.assertEqual(found[5, :3].tolist(), [most, 0.0, 0.0])
            self.assertTrue(bool(found[5, 3].isnan()), "a NaN that was computed must not be hidden")
            self.assertTrue(bool(found[[0, 1, 2, 4, 6, 7]].eq(0).all()))
            k, v = kv_pools(6, 2, dtype, 1, 4, [0])["kv"].layer(0)
            write_kv_torch(rows[:, None], -rows[:, None], k, v, torch.tensor([3, 5]))
            self.assertEqual((k[3, 0, 0].item(), v[3, 0, 0].item()), (most, -most))

    def test_dtype_of_the_pools(self):
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_checkpoint("dsv2", folder)
            for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("fp8_e4m3", FP8)):
                config = ModelConfig.from_path(folder, kv_cache_dtype=name)
                self.assertEqual(kv_dtype(config), dtype)
                self.assertEqual(cache_layout(config, 1).num_bytes(FULL, 1), 3 * (64 + 16) * dtype.itemsize)
            with override_platform(Gfx942()):
                self.assertEqual(kv_dtype(config), torch.float8_e4m3fnuz)


class TestLinearTiles(CustomTestCase):
    def test_the_form_follows_rows_and_shape(self):
        """At the borders: (rows, outputs, columns, architecture) and the form that serves."""
        for rows, width, k_dim, arch, form in (
            (1, 2112, 7168, "sm_90", "one"), (1, 2112, 7168, "gfx942", "one"), (2, 2112, 7168, "sm_90", "narrow"),
            (16, 4095, 2048, "sm_90", "narrow"), (16, 4096, 2048, "sm_90", "wide"), (16, 4096, 1920, "sm_90", "short"),
            (17, 4096, 7168, "sm_90", "narrow 32"), (32, 16385, 2048, "sm_90", "wide 32"),
            (32, 24576, 1536, "sm_90", "short 32"), (33, 4096, 7168, "sm_90", "tiles"),
            (2, 4096, 7168, "gfx942", "tiles"), (9000, 64, 128, "gfx950", "tiles"),
        ):  # fmt: skip
            tile = linear_tile(rows, width, k_dim, arch)
            names = ("narrow", "wide", "short", "narrow 32", "wide 32", "short 32")
            forms = {"one": ONE_ROW_TILE, **{name: t for name, (*_, t) in zip(names, FEW_ROWS_TILES, strict=True)}}
            found = next((name for name, known in forms.items() if known is tile), "tiles")
            self.assertEqual(found, form, (rows, width, k_dim, arch))
            self.assertGreaterEqual(tile.get("BLOCK_M", 1) if form != "tiles" else rows, rows)
            # Scales that are stored by columns are for the tiles, which alone read them by their strides.
            tiles = [tile for _, tile in LINEAR_TILES.get(arch, LINEAR_TILES[""])]
            self.assertIn(linear_tile(rows, width, k_dim, arch, False), tiles)


if __name__ == "__main__":
    unittest.main()
