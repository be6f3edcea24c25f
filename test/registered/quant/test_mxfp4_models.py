"""Models with MXFP4 experts against the same numbers as plain weights, alone and split; configs; what is refused."""

import json
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import sglang.kernels.ops.quant.group_fp8 as group_fp8
from sglang.kernels.ops.quant.mxfp4 import dequantize_mxfp4
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import FP8_BLOCKS, MXFP4, QuantConfig, read_quantization
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Method
from sglang.srt.layers.quantization.unquant import UnquantizedMethod
from sglang.srt.model_executor.memory_plan import count_weights
from sglang.srt.model_loader.loader import build_model, load_draft_model, load_model
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.mxfp4_checkpoints import pack, quark_config, save_four_bit
from sglang.test.published_sizes import BLOCK_FP8, DEEPSEEK_V3
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

PROMPT = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
QUARK = QuantConfig.from_quark(quark_config([]))


def as_they_are(x, dtype):
    """Stands in for the quantisation of activations next to fp8 matrices: none."""
    return x, torch.ones(x.shape[0], x.shape[1] // 128)


def serve(folder, **formats):
    """Log-probabilities of PROMPT: most of it at once, the rest token by token; and the model."""
    page = 256 if "dsv4" in str(folder) else 1
    harness = ModelHarness(str(folder), page_size=page, **formats)
    request = harness.new_request()
    rows = harness.extend([(request, PROMPT[:30])])
    return torch.cat(rows + [harness.decode([(request, token)])[0] for token in PROMPT[30:]]), harness.model


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, FusedMoE)]


class TestModels(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        temporary = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.root, cls.tensors = Path(temporary), {}
        for name, style, sizes in (
            ("dsv3-k", "quark", {"num_hidden_layers": 2}), ("q35moe-k", "quark", {}), ("dsv4", "v4", {}),
        ):  # fmt: skip
            save_tiny_checkpoint(name, cls.root / name / "source", **sizes)
            cls.tensors[name] = save_four_bit(cls.root / name / "source", cls.root / name, style)

    def check(self, name, twin, method, **formats):
        found, model = serve(self.root / name / twin, **formats)
        for experts in experts_of(model):
            self.assertIs(type(experts.quant_method), method)
        wanted, _ = serve(self.root / name / "plain")
        self.assertLess(float((found - wanted).abs().max()), 2e-5, name)

    def test_checkpoints_of_quark(self):
        for name in ("dsv3-k", "q35moe-k"):
            self.check(name, "mxfp4", Mxfp4Method)
        self.check("dsv3-k", "mxfp4", UnquantizedMethod, dequantize_mxfp4=True)

    def test_deepseek_v4(self):
        with mock.patch.object(group_fp8, "quantize_groups_torch", as_they_are):
            self.check("dsv4", "mxfp4", Mxfp4Method)
            self.check("dsv4", "mxfp4", UnquantizedMethod, dequantize_mxfp4=True)

    def test_the_files_say_in_which_format_the_experts_are(self):
        folder = self.root / "dsv4"
        for twin, known in (("mxfp4", MXFP4), ("fp8", FP8_BLOCKS)):
            config = ModelConfig.from_path(str(folder / twin))
            for layer in range(6):
                self.assertEqual(config.quant_config.format_of(f"model.layers.{layer}.mlp.experts"), known)
            self.assertEqual(config.quant_config.format_of("model.layers.0.mlp.shared_experts.down_proj"), FP8_BLOCKS)
        # 64 columns are no whole blocks of 128: only the experts of the other widths could be loaded.
        with self.assertRaisesRegex(ConfigError, "not split at fp8 blocks"):
            serve(folder / "fp8")
        (folder / "bare").mkdir()
        (folder / "bare" / "config.json").write_text((folder / "fp8" / "config.json").read_text())
        bare = ModelConfig.from_path(str(folder / "bare")).quant_config
        self.assertEqual(bare.format_of("model.layers.0.mlp.experts"), MXFP4, "without files the config is believed")
        # Some layers in fp8, and plain ones.
        tensors = load_file(folder / "mxfp4" / "model.safetensors")
        plain = load_file(folder / "plain" / "model.safetensors")
        for name in [name for name in tensors if "layers.2.ffn.experts" in name]:
            del tensors[name]
        tensors |= {name: tensor for name, tensor in plain.items() if "layers.2.ffn.experts" in name}
        (folder / "some").mkdir()
        save_file(tensors, folder / "some" / "model.safetensors")
        (folder / "some" / "config.json").write_text((folder / "mxfp4" / "config.json").read_text())
        with mock.patch.object(group_fp8, "quantize_groups_torch", as_they_are):
            found, model = serve(folder / "some")
        methods = [type(experts.quant_method) for experts in experts_of(model)]
        self.assertEqual(methods, [Mxfp4Method] * 2 + [UnquantizedMethod] + [Mxfp4Method] * 3)
        self.assertLess(float((found - serve(folder / "plain")[0]).abs().max()), 2e-5)

    def test_the_layer_that_drafts(self):
        """DeepSeek V4's MTP layer has experts in MXFP4 of its own, by the headers of the files too."""
        root, drafts = self.root / "dsv4-mtp", []
        save_tiny_v4_mtp(root / "source", num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"],
                         layer_types=["sliding_attention", "compressed_sparse_attention"])  # fmt: skip
        save_four_bit(root / "source", root, "v4")
        for twin in ("mxfp4", "plain"):
            folder = str(root / twin)
            config = ModelConfig.from_path(folder)
            with override_server_args():
                target = load_model(config)
                drafts.append(load_draft_model(config, ServerArgs(model_path=folder), target))
        (four,), (plain,) = (experts_of(draft) for draft in drafts)
        self.assertIs(type(four.quant_method), Mxfp4Method)
        for name in ("w13_weight", "w2_weight"):
            numbers = dequantize_mxfp4(getattr(four, name), getattr(four, f"{name}_scale"))
            self.assertTrue(torch.equal(numbers, getattr(plain, name)), name)

    def failure(self, name, **changes):
        """The refusal of ``name``'s MXFP4 checkpoint with ``changes``, None taking a tensor away."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        save_file({k: v for k, v in {**self.tensors[name], **changes}.items() if v is not None},
                  folder / "model.safetensors")  # fmt: skip
        (folder / "config.json").write_text((self.root / name / "mxfp4" / "config.json").read_text())
        with override_server_args(), self.assertRaises((WeightLoadError, ConfigError)) as caught:
            load_model(ModelConfig.from_path(str(folder)))
        return str(caught.exception)

    def test_what_does_not_fit_is_named(self):
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        scale = f"{name}_scale"
        codes, powers = self.tensors["dsv3-k"][name], self.tensors["dsv3-k"][scale]
        nan = powers.clone()
        nan[5, 1] = 255
        for changes, expected in (
            ({scale: None}, f"missing (1):\n    {scale}"),
            ({name: None}, f"missing (1):\n    {name}"),
            ({scale: nan}, f"{name}: its scales contain byte 255, which is NaN"),
            ({scale: powers.float()}, f"{scale}: dtype float32 is not supported here, only uint8, float8_e8m0fnu"),
            ({scale: powers.t().contiguous()}, f"{scale}: expected shape [128, 8], found [8, 128]"),
            ({name: codes.view(64, 256)}, f"{name}: shape [64, 256] is packed along the wrong axis"),
            ({name: codes[:, :64].contiguous()}, f"{name}: expected shape [128, 128], found [128, 64]"),
            ({name: torch.zeros(128, 256).bfloat16(), scale: None}, "matrices have one format"),
            ({name: torch.zeros(128, 256).to(torch.float8_e4m3fn), scale: None},
             f"{name}: dtype float8_e4m3fn, but config.json says that it is quantised (mxfp4)"),
        ):  # fmt: skip
            with self.subTest(expected):
                self.assertIn(expected, self.failure("dsv3-k", **changes))

    def test_mixed_experts_of_deepseek_v4_are_named(self):
        name = "model.layers.3.ffn.experts.5.w1"
        changes = {f"{name}.weight": torch.zeros(64, 128).to(torch.float8_e4m3fn), f"{name}.scale": None}
        message = self.failure("dsv4", **changes)
        self.assertIn("1 layers have routed experts of several formats", message)
        self.assertIn(f"{name}.weight is fp8", message)

    def test_dummy(self):
        _, model = serve(self.root / "dsv3-k" / "mxfp4", load_format="dummy")
        (experts,) = experts_of(model)
        self.assertEqual((experts.w13_weight.dtype, experts.w13_weight.shape), (torch.uint8, (16, 256, 128)))
        numbers = dequantize_mxfp4(experts.w13_weight[0], experts.w13_weight_scale[0])
        self.assertAlmostEqual(float(numbers.std()) * 256**0.5, 1.0, delta=0.05)


class TestPlan(CustomTestCase):
    def test_bytes_of_experts(self):
        """What is counted for the plan: half a byte a weight, and a byte for each 32."""
        with tempfile.TemporaryDirectory() as folder:
            config = {**DEEPSEEK_V3, "num_hidden_layers": 2, "first_k_dense_replace": 1}
            settings = {**BLOCK_FP8, "expert_dtype": "fp4"}
            (Path(folder) / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
            with override_server_args():
                counted = count_weights(build_model(ModelConfig.from_path(folder), "meta"))["routed experts"]
                plain = count_weights(build_model(ModelConfig.from_path(folder, dequantize_mxfp4=True), "meta"))
        weights = 256 * 3 * 7168 * 2048
        self.assertEqual(counted, weights // 2 + weights // 32)
        self.assertEqual(plain["routed experts"], weights * 4)


class TestSplit(CustomTestCase):
    """Each rank's part of packed experts is its part of the numbers."""

    def build(self, tp, ep, rank):
        world, size = ProcessGroupHandle(rank, tp), ProcessGroupHandle(rank, tp)
        with override_parallel_state(ParallelState(world, size, ep)):
            return FusedMoE(4, 64, 128, 1, quant_config=QUARK)

    def test_widths_and_experts(self):
        generator = torch.Generator().manual_seed(0)
        matrices = [
            {name: pack(torch.randn(shape, generator=generator)) for name, shape in
             {"w1": (128, 64), "w3": (128, 64), "w2": (64, 128)}.items()}
            for _ in range(4)
        ]  # fmt: skip
        for tp, ep in ((1, 1), (2, 1), (4, 1), (4, 2), (4, 4)):
            parts = tp // ep
            for rank in range(tp):
                layer = self.build(tp, ep, rank)
                for expert, named in enumerate(matrices):
                    for name, (codes, scale, _) in named.items():
                        layer.load_expert(name, expert, codes, scale)
                for local in range(4 // ep):
                    own, part = matrices[rank // parts * (4 // ep) + local], rank % parts
                    w13 = torch.cat([own[name][2].chunk(parts)[part] for name in ("w1", "w3")])
                    for found, wanted in (
                        (dequantize_mxfp4(layer.w13_weight[local], layer.w13_weight_scale[local]), w13),
                        (dequantize_mxfp4(layer.w2_weight[local], layer.w2_weight_scale[local]),
                         own["w2"][2].chunk(parts, 1)[part]),
                    ):  # fmt: skip
                        self.assertTrue(torch.equal(found, wanted), (tp, ep, rank))

    def test_a_split_inside_a_group_is_refused(self):
        with self.assertRaisesRegex(ConfigError, r"not split at mxfp4 blocks of 1x32. Keep experts whole with"):
            self.build(8, 1, 0)

    def test_no_slots_for_shared_experts(self):
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_checkpoint("dsv3-k", folder, num_hidden_layers=2)
            config = json.loads((Path(folder) / "config.json").read_text())
            config["quantization_config"] = quark_config(["lm_head", "re:.*self_attn.*"])
            (Path(folder) / "config.json").write_text(json.dumps(config))
            refusal = ModelConfig.from_path(folder).shared_fusion_refusal("none")
        self.assertIn("experts in MXFP4 have no slots", refusal)


class TestQuarkConfig(CustomTestCase):
    def test_read(self):
        names = ["lm_head", "*.self_attn.*", r"re:model\.layers\.[01]\.mlp", "model.layers.61.mlp.experts.3.up_proj"]
        config = read_quantization({"quantization_config": quark_config(names)}, "quark")
        self.assertTrue(config.default.four_bit_rows)
        self.assertEqual(config.method, "quark")
        for name, plain in (
            ("lm_head", True), ("model.layers.7.self_attn.o_proj", True), ("model.layers.1.mlp.gate_up_proj", True),
            ("model.layers.11.mlp.experts", False), ("model.layers.61.mlp.experts", True),
            ("model.layers.6.mlp.experts", False), ("model.layers.7.mlp.shared_experts.down_proj", False),
        ):  # fmt: skip
            self.assertEqual(config.format_of(name) is None, plain, name)
        weight_only = quark_config([])
        weight_only["global_quant_config"]["input_tensors"] = None
        self.assertFalse(read_quantization({"quantization_config": weight_only}, None).default.four_bit_rows)
        layers = {"*self_attn*": {"weight": None, "input_tensors": None}}
        config = read_quantization({"quantization_config": quark_config([], layer_quant_config=layers)}, None)
        self.assertIsNone(config.format_of("model.layers.3.self_attn.kv_b_proj"))

    def test_what_is_not_served_is_named(self):
        def changed(part, **changes):
            settings = quark_config([])
            settings["global_quant_config"][part].update(changes)
            return settings

        eight = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}, "input_tensors": None}
        for settings, reason in (
            (changed("weight", dtype="int4"), "global_quant_config.weight must be MXFP4"),
            (changed("weight", group_size=16), "'group_size': 16"),
            (changed("weight", scale_format="float32"), "'scale_format': 'float32'"),
            (changed("weight", ch_axis=0), "'ch_axis': 0"),
            (changed("input_tensors", is_dynamic=False), "input_tensors must be quantised as they come"),
            (quark_config([], layer_quant_config={"*self_attn*": eight}), "layer_quant_config.*self_attn*.weight"),
            (quark_config([], layer_type_quant_config={"Linear": {}}), "layer_type_quant_config"),
            (quark_config([], kv_cache_quant_config={"*k_proj": eight}), "kv_cache_quant_config"),
            (quark_config([], export={"weight_format": "fake_quantized"}), "export.weight_format"),
            (quark_config([], export={"kv_cache_group": ["*k_proj"]}), "export.kv_cache_group"),
            (quark_config([], global_quant_config=None), "global_quant_config must be an object"),
            (quark_config("lm_head"), "exclude must list names"),
            (quark_config(["re:("]), "is no name"),
            (quark_config([], novelty=[1]), "quantization_config.novelty"),
        ):
            with self.subTest(reason), self.assertRaisesRegex(ConfigError, re.escape(reason)):
                read_quantization({"quantization_config": settings}, None)
        with self.assertRaisesRegex(ConfigError, "has no quantization_config"):
            read_quantization({}, "quark")
        with self.assertRaisesRegex(ConfigError, "which is in fp8"):
            read_quantization({"quantization_config": {"quant_method": "fp8"}}, "quark")
        with self.assertRaisesRegex(ConfigError, "expert_dtype is fp4"):
            read_quantization({"expert_dtype": "fp4"}, None)


if __name__ == "__main__":
    unittest.main()
