"""Checkpoints that do not fit, cannot be read, or come in another form; and the dummy filler."""

import json
import tempfile
import unittest
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang.srt.configs.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.loader import load_draft_model, load_model
from sglang.srt.model_loader.weight_utils import INDEX_NAME, SINGLE_NAME
from sglang.srt.models.checkpoint_model import CheckpointModel, WeightLoadError
from sglang.srt.models.registry import MODEL_CLASSES, resolve_model_class
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import CONFIG_JSON as COMPRESSED
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, thread_ranks
from sglang.test.tiny_checkpoints import TINY_CONFIGS

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

# The vocabulary is odd so that two ranks hold unequal shares of it.
CONFIG = {
    **TINY_CONFIGS["dsv3"], "architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32", "vocab_size": 301,
    "num_hidden_layers": 2,
}  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def stacked(tensors):
    """The other checkpoint form: experts of a layer in two tensors."""
    prefix = "model.layers.1.mlp.experts."
    experts = range(CONFIG["n_routed_experts"])
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    gate_up = [torch.cat([tensors[f"{prefix}{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in experts]
    down = [tensors[f"{prefix}{e}.down_proj.weight"] for e in experts]
    return {**rest, f"{prefix}gate_up_proj": torch.stack(gate_up), f"{prefix}down_proj": torch.stack(down)}


class LoaderTestCase(CustomTestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(override_server_args())
        self.write_config()
        self.tensors = dict(iterate_dummy(self.load("dummy"), seed=1))

    def write_config(self, **changes):
        (self.folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    def load(self, load_format="auto", **settings) -> CheckpointModel:
        return load_model(ModelConfig.from_path(str(self.folder), **settings), load_format, seed=1)

    def save(self, tensors, name=SINGLE_NAME):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)

    def assert_same_weights(self, one, other):
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            self.assertTrue(torch.equal(a, b), name)

    def failure(self):
        with self.assertRaises(WeightLoadError) as caught:
            self.load()
        return str(caught.exception)


class TestForms(LoaderTestCase):
    def test_single_file_sharded_files_and_stacked_experts_give_the_same_model(self):
        expected = self.load("dummy")
        self.save(self.tensors)
        self.assert_same_weights(self.load(), expected)
        self.save(stacked(self.tensors))
        self.assert_same_weights(self.load(), expected)
        (self.folder / SINGLE_NAME).unlink()
        names = sorted(self.tensors)
        weight_map = {}
        for part in range(3):
            file = f"model-0000{part + 1}-of-00003.safetensors"
            self.save({name: self.tensors[name] for name in names[part::3]}, file)
            weight_map.update(dict.fromkeys(names[part::3], file))
        self.assert_same_weights(self.load(), expected)
        (self.folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        self.save({"stale.weight": torch.zeros(1)}, "left-over.safetensors")  # not in the index: not read
        self.assert_same_weights(self.load(), expected)

    def test_every_parameter_is_written(self):
        """Memory that loading leaves as it was would be garbage: poison it first."""
        model = resolve_model_class("DeepseekV3ForCausalLM")(ModelConfig.from_path(str(self.folder)))
        for param in model.parameters():
            param.data.fill_(float("nan"))
        model.load_weights(self.tensors.items())
        for name, param in model.named_parameters():
            self.assertFalse(param.isnan().any().item(), name)

    def test_bfloat16_checkpoint_in_float32_and_back(self):
        self.save({name: tensor.bfloat16() for name, tensor in self.tensors.items()})
        for name, param in self.load().named_parameters():
            self.assertEqual(param.dtype, torch.float32, name)
            self.assertTrue(torch.equal(param, param.bfloat16().float()), name)
        model = self.load(dtype="bfloat16")
        self.assertEqual(model.lm_head.weight.dtype, torch.bfloat16)
        self.assertEqual(model.model.layers[1].mlp.gate.e_score_correction_bias.dtype, torch.float32)

    def test_layers_past_the_last_one_are_left_alone(self):
        extra = {"model.layers.2.eh_proj.weight": torch.zeros(2, 4), "model.layers.2.mlp.gate.weight": torch.zeros(1)}
        self.save({**self.tensors, **extra})
        self.assert_same_weights(self.load(), self.load("dummy"))

    def test_tied_embeddings_need_no_head(self):
        self.write_config(tie_word_embeddings=True)
        for tensors in (self.tensors, {k: v for k, v in self.tensors.items() if k != "lm_head.weight"}):
            self.save(tensors)
            model = self.load()
            self.assertIs(model.lm_head.weight, model.model.embed_tokens.weight)


class TestErrors(LoaderTestCase):
    def test_everything_that_does_not_fit_is_listed_at_once(self):
        tensors = {k: v for k, v in self.tensors.items() if k not in (EXPERT, "model.norm.weight")}
        tensors["lm_head.weight"] = torch.zeros(301, 127)
        tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] = torch.zeros(79, 128)
        tensors["model.layers.1.mlp.experts.16.up_proj.weight"] = torch.zeros(64, 128)
        tensors["model.embed_tokens.weight_scale_inv"] = torch.zeros(3, 1)
        self.save(tensors)
        message = self.failure()
        for line in (
            f"missing (2):\n    {EXPERT}\n    model.norm.weight",
            "unexpected (2):\n    model.embed_tokens.weight_scale_inv\n    model.layers.1.mlp.experts.16.up_proj",
            "wrong shape or dtype (2):\n    lm_head.weight: expected shape [301, 128], found [301, 127]",
            "kv_a_proj_with_mqa.weight: expected shape [80, 128], found [79, 128]",
        ):
            self.assertIn(line, message)

    def test_wrongly_shaped_experts(self):
        self.save({**self.tensors, EXPERT: torch.zeros(128, 64)})
        self.assertIn(f"{EXPERT}: expected shape [64, 128], found [128, 64]", self.failure())
        tensors = stacked(self.tensors)
        tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(15, 128, 64)
        self.save(tensors)
        self.assertIn("experts.down_proj: expected shape [16, 128, 64], found [15, 128, 64]", self.failure())

    def test_a_weight_given_twice(self):
        self.save({**stacked(self.tensors), EXPERT: self.tensors[EXPERT]})
        self.assertIn("given twice (1)", self.failure())

    def test_quantised_weight(self):
        self.save({**self.tensors, "lm_head.weight": self.tensors["lm_head.weight"].to(torch.float8_e4m3fn)})
        self.assertIn("lm_head.weight: dtype float8_e4m3fn is not supported", self.failure())

    def test_nan_in_a_vector(self):
        """A router's bias never enters a weight, so that NaN there would be seen in no output."""
        spoiled = self.tensors[BIAS].clone()
        spoiled[5] = torch.nan
        self.save({**self.tensors, BIAS: spoiled})
        self.assertIn(f"{BIAS}: it contains NaN: the checkpoint is damaged", self.failure())

    def test_truncated_and_corrupt_files_are_named(self):
        self.save(self.tensors)
        path = self.folder / SINGLE_NAME
        whole = path.read_bytes()
        cuts = {"half": whole[: len(whole) // 2], "last byte": whole[:-1], "header": whole[:20], "empty": b""}
        for what, content in {**cuts, "garbage": b"\xff" * 4096}.items():
            with self.subTest(file=what):
                path.write_bytes(content)
                message = self.failure()
                self.assertIn(str(path), message)
                self.assertIn("truncated or corrupt", message)

    def test_bad_index(self):
        self.save(self.tensors)
        index = self.folder / INDEX_NAME
        (self.folder / "sub").mkdir()
        cases = {
            "missing files: model-00002.safetensors": json.dumps({"weight_map": {"a": "model-00002.safetensors"}}),
            "lacks tensors that": json.dumps({"weight_map": {"absent.weight": SINGLE_NAME}}),
            "not a file of that folder": json.dumps({"weight_map": {"a": f"../{self.folder.name}/{SINGLE_NAME}"}}),
            "is not a safetensors index": "{",
            "is not a safetensors index (KeyError": "{}",
        }
        for expected, text in cases.items():
            with self.subTest(expected=expected):
                index.write_text(text)
                self.assertIn(expected, self.failure())

    def test_no_safetensors(self):
        self.assertIn("contains no *.safetensors file", self.failure())
        (self.folder / "pytorch_model.bin").write_bytes(b"x")
        self.assertIn("pytorch_model.bin: convert them to safetensors", self.failure())

    def test_unknown_names(self):
        with self.assertRaisesRegex(ValueError, "DeepseekV3ForCausalLM"):
            resolve_model_class("LlamaForCausalLM")
        with self.assertRaisesRegex(ValueError, "auto, safetensors, dummy"):
            self.load("gguf")


class TestDummy(LoaderTestCase):
    def test_healthy_numbers(self):
        tensors = dict(iterate_dummy(self.load("dummy"), seed=0))
        self.assertTrue(torch.equal(tensors["model.norm.weight"], torch.ones(128)))
        for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight", EXPERT):
            deviation = tensors[name].std().item() * tensors[name].shape[1] ** 0.5
            self.assertAlmostEqual(deviation, 1.0, delta=0.05, msg=name)
        self.assertTrue(0.02 < tensors[BIAS].std().item() < 0.09)
        self.assertFalse(torch.equal(tensors[EXPERT], tensors[EXPERT.replace(".3.", ".4.")]))

    def test_the_seed_and_the_name_decide(self):
        model = self.load("dummy")
        again, other = dict(iterate_dummy(model, seed=1)), dict(iterate_dummy(model, seed=2))
        self.assertTrue(all(torch.equal(self.tensors[name], again[name]) for name in again))
        self.assertFalse(torch.equal(again[EXPERT], other[EXPERT]))

    def test_every_layer_that_drafts(self):
        """DeepSeek V4's has names of its own that no file has."""
        for config in (CONFIG, COMPRESSED):
            (self.folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
            read, args = ModelConfig.from_path(str(self.folder)), ServerArgs(load_format="dummy")
            draft = load_draft_model(read, args, load_model(read, "dummy"))
            self.assertTrue(all(bool(param.isfinite().all()) for param in draft.parameters()))

    def test_two_ranks_hold_the_same_model_as_one(self):
        whole = self.load("dummy")
        parts = []
        for handle in thread_ranks(2):
            with override_tp_group(handle):
                parts.append(self.load("dummy"))
        one, first, second = (dict(model.named_parameters()) for model in (whole, *parts))
        rows = ("q_b_proj.weight", "kv_b_proj.weight", "embed_tokens.weight", "lm_head.weight")
        for name, param in one.items():
            a, b = first[name], second[name]
            if name.endswith(("gate_up_proj.weight", "w13_weight")):
                dim = a.dim() - 2
                (ga, ua), (gb, ub) = a.chunk(2, dim), b.chunk(2, dim)
                joined = torch.cat((ga, gb, ua, ub), dim)
            elif name.endswith(rows):
                joined = torch.cat((a, b))[: param.shape[0]]
            elif name.endswith(("o_proj.weight", "down_proj.weight", "w2_weight")):
                joined = torch.cat((a, b), dim=-1)
            else:
                self.assertTrue(torch.equal(a, b), name)
                joined = a
            self.assertTrue(torch.equal(joined, param), name)


class TestRegistry(CustomTestCase):
    def test_every_supported_architecture_has_a_model_with_a_head(self):
        self.assertEqual(set(MODEL_CLASSES), set(SUPPORTED_ARCHITECTURES))
        for architecture in MODEL_CLASSES:
            model_class = resolve_model_class(architecture)
            self.assertTrue(issubclass(model_class, CheckpointModel))
            self.assertTrue(model_class.__name__.endswith(("ForCausalLM", "ForConditionalGeneration")))


if __name__ == "__main__":
    unittest.main()
