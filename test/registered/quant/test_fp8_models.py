"""Models with fp8 weights and caches against transformers on the same weights scaled back, alone, split and served."""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import sglang.kernels.ops.attention.kv_cache as kv_cache
import sglang.kernels.ops.quant.group_fp8 as group_fp8
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.fp8 import Fp8Method
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import quantize_tiny_checkpoint, save_tiny_checkpoint

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

# Widths whose halves are still whole blocks.
MODELS = {
    "dsv3-k": {"moe_intermediate_size": 256},
    "q35moe-k": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
}
PROMPT = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
# Root mean square of the relative error that rounding to 3 bits of fraction makes.
ROUNDING = 0.026


class Gfx942(CpuPlatform):
    """A machine whose 8-bit floats are FNUZ."""

    arch = "gfx942"


def as_they_are(x, dtype):
    """Stands in for the quantisation of activations: none."""
    return x, torch.ones(x.shape[0], x.shape[1] // 128)


def with_noise(x, dtype):
    """Stands in for it: random relative errors as large as its own."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return as_they_are(x * (1 + ROUNDING * noise), dtype)


def activations(quantize):
    return mock.patch.object(group_fp8, "quantize_groups_torch", quantize)


def serve(harness):
    """Log-probabilities of PROMPT: most of it at once, the rest token by token."""
    harness.reset()
    request = harness.new_request()
    rows = harness.extend([(request, PROMPT[:50])])
    return torch.cat(rows + [harness.decode([(request, token)])[0] for token in PROMPT[50:]])


def rms(x):
    return float(x.pow(2).mean().sqrt())


class TestModels(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        temporary = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.folders, cls.truths = {}, {}
        for name, overrides in MODELS.items():
            root = Path(temporary) / name
            save_tiny_checkpoint(name, root / "plain", **overrides)
            tensors = quantize_tiny_checkpoint(root / "plain", root / "fp8")
            (root / "back").mkdir()
            save_file(tensors, root / "back" / "model.safetensors", metadata={"format": "pt"})
            (root / "back" / "config.json").write_text((root / "plain" / "config.json").read_text())
            twin = AutoModelForCausalLM.from_pretrained(root / "back", dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                cls.truths[name] = twin.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
            cls.folders[name] = str(root / "fp8")

    def harness(self, name, **formats):
        return ModelHarness(self.folders[name], num_slots=256, max_requests=4, **formats)

    def test_weights_are_those_of_transformers(self):
        for name, truth in self.truths.items():
            for platform in (CpuPlatform(), Gfx942()):
                with self.subTest(name, arch=platform.arch), override_platform(platform):
                    harness = self.harness(name)
                    kinds = {param.dtype for param in harness.model.parameters()}
                    self.assertIn(group_fp8.fp8_dtype(platform.arch), kinds)
                    with activations(as_they_are):
                        self.assertLess((serve(harness) - truth).abs().max().item(), 1e-4)

    def test_quantised_activations_cost_no_more_than_noise_of_their_size(self):
        for name, truth in self.truths.items():
            harness = self.harness(name)
            loss = rms(serve(harness) - truth)
            with activations(with_noise):
                noise = rms(serve(harness) - truth)
            print(f"{name}: rms of log-probability errors {loss:.3f}, with random noise {noise:.3f}")
            self.assertLess(loss, 1.5 * noise)
            self.assertGreater(loss, 0.5 * noise, "activations are not quantised")

    def test_rows_are_quantised_where_they_are_made(self):
        """All layers but attention's output get quantised rows; the result equals that with plain rows bit for bit."""
        harness = self.harness("dsv3-k")
        quantised = {}
        for name, module in harness.model.named_modules():
            if isinstance(getattr(module, "quant_method", None), Fp8Method):

                def note(_, args, name=name):
                    quantised[name] = isinstance(args[0], group_fp8.QuantizedRows)

                module.register_forward_pre_hook(note)
        found = serve(harness)
        alone = {name.rpartition(".")[2] for name, made in quantised.items() if not made}
        self.assertEqual(alone, {"o_proj"})
        self.assertGreater(len(quantised), 4 * len(harness.model.model.layers))
        with mock.patch.object(RMSNorm, "quantize_for", lambda norm, consumer: None):
            self.assertTrue(torch.equal(serve(self.harness("dsv3-k")), found))

    def test_attention_quantises_its_output_where_it_makes_it(self):
        """Decode steps of the Triton backend's plans, over the references of its ops."""
        harness, made = self.harness("dsv3-k"), []
        for name, module in harness.model.named_modules():
            if name.endswith("o_proj"):
                module.register_forward_pre_hook(lambda _, args: made.append(type(args[0])))
        with activations(as_they_are):
            wanted = serve(harness)
            self.assertNotIn(group_fp8.QuantizedRows, made)
            harness.backend = make_attention_backend("triton", harness.context())
            made.clear()
            self.assertLess((serve(harness) - wanted).abs().max().item(), 1e-4)
        # One extend step, and as many decode steps as there are tokens left.
        layers = len(harness.model.model.layers)
        self.assertEqual(made.count(group_fp8.QuantizedRows), layers * len(PROMPT[50:]))
        self.assertEqual(made.count(torch.Tensor), layers)

    def test_two_ranks_are_one(self):
        for name in MODELS:
            whole = self.harness(name)
            ranks = []
            for handle in thread_ranks(2):
                with override_tp_group(handle):
                    ranks.append(self.harness(name))
            with activations(as_they_are):
                wanted, found = serve(whole), run_ranks(serve, ranks)
            self.assertLess((found[0] - wanted).abs().max().item(), 1e-4)
            self.assertTrue(torch.equal(*found))
            # A sum in another order may round an activation, or route a token, the other way.
            self.assertLess(rms(run_ranks(serve, ranks)[0] - serve(whole)), 0.1)

    def test_an_fp8_cache_holds_the_rounded_rows(self):
        """Rows rounded before they go into a float32 cache must give what an fp8 cache gives."""
        write = kv_cache._write_rows

        def rounded(cache, slots, rows):
            return write(cache, slots, rows.clamp(-448, 448).to(torch.float8_e4m3fn).float())

        for name, truth in self.truths.items():
            with activations(as_they_are):
                found = serve(self.harness(name, kv_cache_dtype="fp8_e4m3"))
                with mock.patch.object(kv_cache, "_write_rows", rounded):
                    self.assertLess((serve(self.harness(name)) - found).abs().max().item(), 1e-4)
            loss = rms(found - truth)
            print(f"{name}: rms of log-probability errors with an fp8 cache alone {loss:.3f}")
            self.assertTrue(bool(found.isfinite().all()))
            self.assertTrue(1e-4 < loss < 0.2, loss)

    def test_served(self):
        params = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
        for name in MODELS:
            for options in ({}, {"kv_cache_dtype": "fp8_e4m3", "chunked_prefill_size": 16, "page_size": 4}):
                engine = EngineHarness(
                    self.folders[name], max_total_tokens=512, max_running_requests=4, random_seed=1, **options
                )
                self.assertEqual(engine.args.quantization, "fp8")
                self.assertEqual(engine.runner.describe()["plain_by_split"], [])
                for rid, end in (("whole", 60), ("prefix", 30)):
                    engine.submit(rid, PROMPT[:end], params, return_logprob=True, logprob_start_len=0)
                results = engine.run()
                for rid, result in results.items():
                    self.assertEqual(len(result.output_ids), 6, rid)
                    self.assertTrue(all(value <= 0.0 for value in result.output_logprobs.logprobs), rid)
                scored = torch.tensor(results["whole"].input_logprobs.logprobs[1:])
                truth = self.truths[name][:-1].gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1)
                self.assertLess(rms(scored - truth), 0.4)


if __name__ == "__main__":
    unittest.main()
