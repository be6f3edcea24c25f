"""The MTP layers of DeepSeek V3 and Qwen3.5 against transformers' MtpModel: single steps, chains, and their loading."""

import shutil
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.fp8 import Fp8Method
from sglang.srt.model_loader.loader import build_draft_model, load_draft_model, load_model
from sglang.srt.model_loader.weight_utils import iterate_safetensors
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mtp_harness import MtpHarness
from sglang.test.mtp_reference import load_mtp, save_tiny_mtp_checkpoint, share_accepted
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import quantize_tiny_checkpoint
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, heldout_questions

register_cpu_ci(est_time=40, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
# Where the truth's two best drafts are closer than this, either may be chosen.
TIE = 2e-4
LENGTHS = (70, 33, 9, 2, 1)
CHAIN = 3
CHECKPOINTS = ("dsv3", "q35moe", "q35")


class Truth:
    """What transformers drafts after each prompt, and the harness that is compared with it."""

    def __init__(self, name, folder):
        self.folder = Path(folder) / name
        self.hf, self.mtp = save_tiny_mtp_checkpoint(name, self.folder)
        self.harness = MtpHarness(str(self.folder))
        generator = torch.Generator().manual_seed(11)
        self.prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS]

    @torch.no_grad()
    def drafts(self, prompt):
        """Successors of the prompt's tokens, log-probabilities of the rows [N, V], and those of the later drafts."""
        from transformers.cache_utils import MtpCache

        out = self.hf(torch.tensor([prompt]), output_hidden_states=False)
        hidden = self.hf.model(torch.tensor([prompt])).last_hidden_state
        successors = [*prompt[1:], int(out.logits[0, -1].argmax())]
        cache = MtpCache(config=self.hf.config.get_mtp_config())
        positions = torch.arange(1, len(prompt) + 1)[None]
        rows = self.mtp.forward_layer(0, hidden, positions, cache, input_ids=torch.tensor([successors]))
        first = self.mtp._project_to_logits(rows)[0].log_softmax(-1)
        later, last = [], first[-1]
        for step in range(1, CHAIN):
            token = last.argmax().view(1, 1)
            rows = self.mtp.forward_layer(0, rows[:, -1:], positions[:, -1:] + step, cache, input_ids=token)
            last = self.mtp._project_to_logits(rows)[0, -1].log_softmax(-1)
            later.append(last)
        return successors, first, later


class TestMtpParity(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # matrices this small only wait for a second thread
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.truths = {name: Truth(name, folder) for name in CHECKPOINTS}
        cls.ties = 0

    @classmethod
    def tearDownClass(cls):
        print(f"drafts whose two best were within {TIE}: {cls.ties}")

    def each(self):
        for name, truth in self.truths.items():
            with self.subTest(model=name):
                truth.harness.reset()
                truth.harness.poison_draft()
                yield truth

    def check(self, found, expected, what):
        self.assertEqual(found.shape, expected.shape, what)
        self.assertLess(float((found - expected).abs().max()), TOLERANCE, what)
        best = expected.topk(2).values
        tied = best[..., 0] - best[..., 1] < TIE
        type(self).ties += int(tied.sum())
        self.assertTrue(bool((tied | (found.argmax(-1) == expected.argmax(-1))).all()), what)

    def test_single_steps_and_chains(self):
        spread = 0.0
        for truth in self.each():
            for prompt in truth.prompts:
                successors, first, later = truth.drafts(prompt)
                request = truth.harness.new_request()
                truth.harness.extend([(request, prompt)])
                found, rows = truth.harness.draft_extend(successors)
                self.check(found, first, f"{len(prompt)} rows")
                spread, last = max(spread, float(first.std())), first[-1]
                for step, expected in enumerate(later, 2):
                    found, rows = truth.harness.draft_decode(request, int(last.argmax()), rows[-1:])
                    self.check(found[0], expected, f"draft {step} behind {len(prompt)} tokens")
                    last = expected
        self.assertGreater(spread, 0.3, "near-uniform drafts would let a wrong layer pass")

    def test_a_packed_step_and_chunks(self):
        """At the end of a chunk the successor is the prompt's next token."""
        for truth in self.each():
            harness, cases = truth.harness, [truth.drafts(prompt) for prompt in truth.prompts]
            harness.extend([(harness.new_request(), prompt) for prompt in truth.prompts])
            found, _ = harness.draft_extend([token for successors, _, _ in cases for token in successors])
            for part, (_, first, _) in zip(found.split(LENGTHS), cases, strict=True):
                self.check(part, first, f"{len(first)} rows of a packed step")
            prompt, (successors, first, _) = truth.prompts[0], cases[0]
            for size in (7, 64):
                request, parts = harness.new_request(), []
                for start in range(0, len(prompt), size):
                    harness.extend([(request, prompt[start : start + size])])
                    parts.append(harness.draft_extend(successors[start : start + size])[0])
                self.check(torch.cat(parts), first, f"chunks of {size}")

    def test_two_tensor_parallel_ranks(self):
        for truth in self.each():
            ranks = []
            for handle in thread_ranks(2):
                with override_tp_group(handle):
                    ranks.append(MtpHarness(str(truth.folder), num_slots=128))
            prompt = truth.prompts[1]
            successors, first, later = truth.drafts(prompt)

            def serve(harness, prompt=prompt, successors=successors, first=first):
                request = harness.new_request()
                harness.extend([(request, prompt)])
                found, rows = harness.draft_extend(successors)
                next_found, _ = harness.draft_decode(request, int(first[-1].argmax()), rows[-1:])
                return torch.cat((found, next_found))

            for found in run_ranks(serve, ranks):
                self.check(found, torch.cat((first, later[0][None])), "two ranks")

    def test_each_rule_shows(self):
        """Hidden rows before the norm, the other order of the two inputs, ids without shift: all differ clearly."""
        for truth in self.each():
            harness, prompt = truth.harness, truth.prompts[1]
            successors, first, _ = truth.drafts(prompt)
            before = []
            hook = harness.model.model.norm.register_forward_hook(
                lambda _, args, out, before=before: before.append(out[1])
            )
            harness.extend([(harness.new_request(), prompt)])
            hook.remove()
            projection = harness.draft._parts.projection.weight.data
            width = projection.shape[1] // 2
            self.check(harness.draft_extend(successors)[0], first, "unbroken")
            broken = {"before the norm": harness.draft_extend(successors, before[0])[0]}
            broken["not shifted"] = harness.draft_extend(prompt)[0]
            projection.copy_(projection.roll(width, 1))
            broken["other order"] = harness.draft_extend(successors)[0]
            projection.copy_(projection.roll(width, 1))
            for what, found in broken.items():
                self.assertGreater(float((found - first).abs().max()), 0.1, what)

    def test_kv_of_the_draft_is_one_more_layer_and_the_target_keeps_its_own(self):
        for truth in self.each():
            harness = truth.harness
            layer_id = harness.model.num_hidden_layers
            harness.extend([(harness.new_request(), truth.prompts[1])])
            kept = [rows.clone() for rows in harness.cached_rows(layer_id - 1)]
            self.assertTrue(all(rows.isnan().all() for rows in harness.cached_rows(layer_id)))
            harness.draft_extend(truth.drafts(truth.prompts[1])[0])
            for before, after in zip(kept, harness.cached_rows(layer_id - 1), strict=True):
                self.assertTrue(torch.equal(before, after))
            for rows in harness.cached_rows(layer_id):
                written = ~rows.flatten(1).isnan().any(1)
                self.assertEqual(int(written.sum()), LENGTHS[1])


class TestEmbeddedDrafts(CustomTestCase):
    """The trained layers, by transformers and by ours."""

    def test_drafts_are_accepted(self):
        torch.set_num_threads(1)
        prompts = [list(question.text.encode()) for question in heldout_questions(20)]
        for name in ("deepseek-v3-tiny", "qwen3.5-moe-tiny"):
            with self.subTest(name):
                model, mtp = load_mtp(EMBEDDED_MODELS[name])
                shares, length = share_accepted(model, mtp, prompts, 257, MAX_NEW_TOKENS)
                print(
                    f"{name}: accepted {', '.join(f'{share:.3f}' for share in shares)}, {length:.3f} tokens per cycle"
                )
                for share, wanted in zip(shares, (0.85, 0.7, 0.5), strict=True):
                    self.assertGreaterEqual(share, wanted)

    def test_ours_drafts_the_same(self):
        question = heldout_questions(8)[1]  # an answer of several characters
        text = list((question.text + question.answer).encode())
        for name in ("deepseek-v3-tiny", "qwen3.5-moe-tiny"):
            with self.subTest(name):
                harness = MtpHarness(str(EMBEDDED_MODELS[name]))
                harness.extend([(harness.new_request(), text)])
                drafts = harness.draft_extend([*text[1:], 257])[0].argmax(-1).tolist()
                first = len(question.text)
                self.assertEqual(drafts[first - 1 : -1], [*text[first + 1 :], 257])


class TestMtpLoading(CustomTestCase):
    def setUp(self):
        torch.set_num_threads(1)
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def saved(self, name, **overrides):
        save_tiny_mtp_checkpoint(name, self.root / name, **overrides)
        return self.root / name

    def load(self, folder, target_folder=None, **settings):
        with override_server_args(**settings):
            target = load_model(ModelConfig.from_path(str(target_folder or folder)))
            config = ModelConfig.from_path(str(folder))
            return target, load_draft_model(config, ServerArgs(model_path=str(folder)), target)

    def rewrite(self, folder, change):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def test_embedding_and_head_are_the_targets(self):
        for name in ("dsv3", "q35moe"):
            target, draft = self.load(self.saved(name))
            self.assertIs(draft._shared[0], target.model.embed_tokens)
            self.assertIs(draft._shared[1], target.lm_head)
            own = {param.data_ptr() for param in draft.parameters()}
            self.assertFalse(own & {param.data_ptr() for param in target.parameters()})

    def test_shared_experts_take_the_form_of_the_target(self):
        for name in ("dsv3", "q35moe"):
            for disabled in (False, True):
                target, draft = self.load(self.saved(name), disable_shared_experts_fusion=disabled)
                self.assertEqual(draft.num_fused_shared_experts, target.num_fused_shared_experts)
                self.assertEqual(draft.num_fused_shared_experts, 0 if disabled else 1)

    def test_it_has_experts_wherever_the_dense_layers_stand(self):
        folder = self.saved("dsv3")
        config = ModelConfig.from_path(str(folder))
        with override_server_args():
            target = load_model(config)
            for keys in ({"moe_layer_freq": 2}, {"first_k_dense_replace": 9}):
                other = replace(config, text=replace(config.text, **keys))
                self.assertTrue(load_draft_model(other, ServerArgs(model_path=str(folder)), target)._parts.layer.is_moe)

    def test_a_folder_with_the_layer_alone(self):
        for name in ("dsv3", "q35moe"):
            folder, alone = self.saved(name), self.root / f"{name}-alone"
            shutil.copytree(folder, alone)

            own = ("mtp.", "model.layers.3.")[name == "dsv3"]
            self.rewrite(
                alone, lambda tensors, own=own: [tensors.pop(key) for key in [*tensors] if not key.startswith(own)]
            )
            whole, part = (self.load(source, folder)[1] for source in (folder, alone))
            for (path, param), (_, other) in zip(whole.named_parameters(), part.named_parameters(), strict=True):
                self.assertTrue(torch.equal(param, other), path)

    def test_dummy_weights_need_no_tensors(self):
        for name in ("dsv3", "q35moe"):
            folder = self.saved(name)
            (folder / "model.safetensors").unlink()
            config = ModelConfig.from_path(str(folder))
            with override_server_args():
                target = load_model(config, "dummy")
                before = target.lm_head.weight.clone()
                draft = load_draft_model(config, ServerArgs(model_path=str(folder), load_format="dummy"), target)
                on_meta = build_draft_model(config, load_model(config, "dummy", "meta"), "meta", load_format="dummy")
            self.assertTrue(torch.equal(target.lm_head.weight, before))
            self.assertTrue(all(bool(param.isfinite().all()) for param in draft.parameters()))
            self.assertEqual(float(draft._parts.embed_norm.weight.mean()), 1.0 if name == "dsv3" else 0.0)
            sizes = [sum(param.numel() for param in model.parameters()) for model in (draft, on_meta)]
            self.assertEqual(*sizes)

    def test_copies_of_embedding_and_head_are_not_read(self):
        folder = self.saved("dsv3")
        names = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
        copies = {name: torch.zeros(3) for name in names}
        self.rewrite(folder, lambda tensors: tensors.update(copies))
        self.load(folder)

    def test_only_wanted_tensors_are_read(self):
        folder = self.saved("q35moe")
        names = [name for name, _ in iterate_safetensors(folder, lambda name: name.startswith("mtp."))]
        self.assertTrue(names and all(name.startswith("mtp.") for name in names))
        self.assertLess(len(names), len(list(iterate_safetensors(folder))))

    def test_missing_and_misshapen_tensors_are_named(self):
        for name, lost, bent in (
            ("dsv3", "model.layers.3.enorm.weight", "model.layers.3.eh_proj.weight"),
            ("q35moe", "mtp.norm.weight", "mtp.fc.weight"),
        ):
            folder = self.saved(name)

            def change(tensors, lost=lost, bent=bent):
                del tensors[lost]
                tensors[bent] = tensors[bent][:, :-1].contiguous()

            self.rewrite(folder, change)
            with self.assertRaises(WeightLoadError) as caught:
                self.load(folder)
            self.assertIn(lost, str(caught.exception))
            self.assertIn(f"{bent}: expected shape [128, 256], found [128, 255]", str(caught.exception))

    def test_a_folder_without_the_layer_is_refused(self):
        def drop(tensors):
            for name in [name for name in tensors if name.startswith(("mtp.", "model.layers.3."))]:
                del tensors[name]

        folder = self.saved("dsv3")
        self.rewrite(folder, drop)
        with self.assertRaisesRegex(WeightLoadError, r"no tensor model\.layers\.3\.\*"):
            self.load(folder)
        for name, key, value, said in (
            ("dsv3", "num_nextn_predict_layers", 0, "no MTP layer"),
            ("dsv3", "num_nextn_predict_layers", 2, "num_nextn_predict_layers is 2"),
            ("q35moe", "mtp_num_hidden_layers", 0, "no MTP layer"),
            ("q35moe", "mtp_use_dedicated_embeddings", True, "mtp_use_dedicated_embeddings is true"),
        ):
            folder = self.saved(name)
            config = ModelConfig.from_path(str(folder))
            with override_server_args():
                target = load_model(config)
            config = replace(config, text=replace(config.text, **{key: value}))
            with self.assertRaisesRegex(ConfigError, said):
                load_draft_model(config, ServerArgs(model_path=str(folder)), target)

    def test_a_layer_of_another_model_is_refused(self):
        folder, other = self.saved("q35moe"), self.root / "other"
        save_tiny_mtp_checkpoint("q35moe", other, vocab_size=384, head_dim=32)
        with self.assertRaisesRegex(ConfigError, "vocab_size is 384, and that of the model 512(.|\n)*head_dim is 32"):
            self.load(other, folder)

    def test_a_quantised_checkpoint_and_its_plain_layer(self):
        """The layer of an fp8 checkpoint has the format that its tensors have, whatever the config lists."""
        for name, prefix in (("dsv3-k", "model.layers.3."), ("q35moe-k", "mtp.")):
            with self.subTest(name):
                folder = self.saved(name)
                plain = load_file(folder / "model.safetensors")
                quantize_tiny_checkpoint(folder, self.root / f"{name}-fp8")
                target, draft = self.load(self.root / f"{name}-fp8")
                experts = draft._parts.layer.mlp.experts
                self.assertIsInstance(experts.quant_method, Fp8Method)
                self.assertEqual(experts.w13_weight.dtype, torch.float8_e4m3fn)

                def unquantise(tensors, plain=plain, prefix=prefix):
                    for key in [key for key in tensors if key.startswith(prefix)]:
                        del tensors[key]
                    tensors |= {key: tensor for key, tensor in plain.items() if key.startswith(prefix)}

                self.rewrite(self.root / f"{name}-fp8", unquantise)
                target, draft = self.load(self.root / f"{name}-fp8")
                self.assertIsInstance(target.model.layers[2].mlp.experts.quant_method, Fp8Method)
                self.assertEqual({param.dtype for param in draft.parameters()}, {torch.float32})
                self.assertTrue(
                    torch.equal(
                        draft._parts.layer.self_attn.o_proj.weight, plain[f"{_layer(prefix)}self_attn.o_proj.weight"]
                    )
                )
                self.assertTrue(
                    torch.equal(
                        draft._parts.layer.mlp.experts.w2_weight[1],
                        plain[f"{_layer(prefix)}mlp.experts.1.down_proj.weight"],
                    )
                )


def _layer(prefix):
    return "mtp.layers.0." if prefix == "mtp." else prefix


if __name__ == "__main__":
    unittest.main()
