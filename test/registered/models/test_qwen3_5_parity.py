"""Qwen3.5, dense and MoE, against transformers on the same tiny checkpoints in float32."""

import tempfile
import unittest
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode, ModelWorkerBatch
from sglang.srt.models.registry import resolve_model_class
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS, build_hf_model

register_cpu_ci(est_time=10, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
LENGTHS = (140, 64, 33, 9, 2, 1)


def build_truth(name, **overrides):
    """transformers' model, with queries and keys of the first recurrent layer so small that the epsilon of their
    norm counts."""
    model = build_hf_model({**TINY_CONFIGS[name], **overrides})
    mixer = model.model.layers[0].linear_attn
    with torch.no_grad():
        mixer.conv1d.weight[: 2 * mixer.key_dim] *= 0.004
    return model


class Truth:
    """A saved checkpoint, its harness, some sequences, and what transformers says of every position."""

    def __init__(self, name, folder, **overrides):
        self.folder = Path(folder) / name
        self.hf = build_truth(name, **overrides)
        self.hf.save_pretrained(str(self.folder))
        self.harness = ModelHarness(str(self.folder))
        generator = torch.Generator().manual_seed(11)
        self.sequences = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS]
        self.logprobs = [self.score(tokens) for tokens in self.sequences]

    def score(self, tokens):
        with torch.no_grad():
            return self.hf(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


class TestQwen35Parity(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # matrices this small only wait for a second thread
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.truths = {name: Truth(name, cls.folder) for name in ("q35", "q35moe", "q35moe-ns")}

    def each(self):
        for name, truth in self.truths.items():
            with self.subTest(model=name):
                yield truth

    def check(self, found, expected, what):
        self.assertEqual(tuple(found.shape), tuple(expected.shape), what)
        worst = float((found - expected).abs().max()) if found.numel() else 0.0
        self.assertLess(worst, TOLERANCE, f"{what}: log-probabilities differ by {worst:.2e}")

    def test_full_prefill_of_a_packed_batch(self):
        for truth in self.each():
            harness = truth.harness
            outs = harness.extend([(harness.new_request(), tokens) for tokens in truth.sequences])
            for out, expected in zip(outs, truth.logprobs, strict=True):
                self.check(out, expected, f"length {len(expected)}")

    def test_chunked_prefill(self):
        for truth in self.each():
            for size in (7, 64):
                request, tokens, outs = truth.harness.new_request(), truth.sequences[0], []
                for start in range(0, len(tokens), size):
                    outs += truth.harness.extend([(request, tokens[start : start + size])])
                self.check(torch.cat(outs), truth.logprobs[0], f"chunks of {size}")

    def test_decode_after_prefill_and_states_equal_transformers_cache(self):
        for truth in self.each():
            harness, count = truth.harness, 8
            members = [i for i, length in enumerate(LENGTHS) if length > count]
            requests = [harness.new_request() for _ in members]
            harness.extend([(r, truth.sequences[i][:-count]) for r, i in zip(requests, members, strict=True)])
            for step in range(-count, 0):
                outs = harness.decode([(r, truth.sequences[i][step]) for r, i in zip(requests, members, strict=True)])
                for out, i in zip(outs, members, strict=True):
                    self.check(out[0], truth.logprobs[i][step], f"length {LENGTHS[i]}, decode step {step}")
            for request, i in zip(requests, members, strict=True):
                self.check_states(truth, request, truth.sequences[i], count)

    def check_states(self, truth, request, tokens, count):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            cache = truth.hf(ids[:, :-count], use_cache=True).past_key_values
            for step in range(-count, 0):
                cache = truth.hf(ids[:, step : step + 1 or None], past_key_values=cache).past_key_values
        pool = truth.harness.pools["gdn"]
        for layer_id in pool.spec.layer_ids:
            conv, ssm = pool.layer(layer_id)
            layer = cache.layers[layer_id]
            state, columns = _first(layer.recurrent_states), _first(layer.conv_states)
            found = ssm[request.state_slot]
            torch.testing.assert_close(found, state[0].transpose(-1, -2), atol=2e-5, rtol=1e-4)
            found = conv[request.state_slot]
            torch.testing.assert_close(found, columns[0][:, -found.shape[1] :], atol=2e-5, rtol=1e-4)

    def test_mixed_batch(self):
        for truth in self.each():
            harness, sequences = truth.harness, truth.sequences
            decoding, continued = harness.new_request(), harness.new_request()
            harness.extend([(decoding, sequences[2][:20]), (continued, sequences[0][:70])])
            step = [
                (harness.new_request(), sequences[5]),
                (decoding, sequences[2][20:21]),
                (continued, sequences[0][70:]),
                (harness.new_request(), sequences[3]),
            ]
            outs = harness.extend(step, mode=ForwardMode.MIXED)
            logprobs = truth.logprobs
            expected = (logprobs[5], logprobs[2][20:21], logprobs[0][70:], logprobs[3])
            for out, wanted in zip(outs, expected, strict=True):
                self.check(out, wanted, f"{wanted.shape[0]} rows of a mixed step")
            out = harness.decode([(decoding, sequences[2][21])])[0]
            self.check(out[0], logprobs[2][21], "decode after a mixed step")

    def test_restored_snapshot_continues_like_the_sequence_it_was_taken_from(self):
        for truth in self.each():
            harness, tokens = truth.harness, truth.sequences[0]
            donor = harness.new_request()
            harness.extend([(donor, tokens[:64])])
            snapshot = harness.state_slots.alloc(zero=False)
            harness.state_slots.copy(donor.state_slot, snapshot)
            other = [(token + 1) % 512 for token in tokens[64:70]]
            strayed = harness.extend([(donor, other)])[0]
            heir = harness.new_request()
            harness.requests.write(heir.row, 0, harness.requests.read(donor.row, 0, 64))
            harness.state_slots.copy(snapshot, heir.state_slot)
            heir.num_tokens = 64
            self.check(harness.extend([(heir, tokens[64:])])[0], truth.logprobs[0][64:], "from the snapshot")
            expected = truth.score(tokens[:64] + other)[64:]
            self.check(strayed, expected, "the donor that went on")

    def test_a_step_without_tokens_is_a_step(self):
        for truth in self.each():
            model, backend = truth.harness.model, truth.harness.backend
            batch = empty_batch(backend)
            backend.init_forward_metadata(batch)
            out = model(batch.input_ids, batch.positions, batch)
            self.assertEqual(tuple(out.next_token_logits.shape), (0, 512))

    def test_conditional_generation_folder_gives_identical_logits(self):
        for name, kind, architecture in (
            ("q35", "qwen3_5", "Qwen3_5ForConditionalGeneration"),
            ("q35moe", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        ):
            with self.subTest(model=name):
                truth = self.truths[name]
                harness = ModelHarness(str(self.conditional_folder(truth, name, kind, architecture)))
                self.assertIs(type(harness.model), resolve_model_class(architecture))
                found = harness.extend([(harness.new_request(), truth.sequences[2])])[0]
                again = truth.harness.extend([(truth.harness.new_request(), truth.sequences[2])])[0]
                self.assertTrue(torch.equal(found, again))

    def conditional_folder(self, truth, name, kind, architecture):
        """What transformers saves of its class with the same text weights, then what hub files add: stacked experts
        and a draft head."""
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
        vision |= {"out_hidden_size": 128, "num_position_embeddings": 16}
        config = AutoConfig.for_model(
            kind, text_config=TINY_CONFIGS[name], vision_config=vision, tie_word_embeddings=False
        )
        whole = getattr(transformers, architecture)(config)
        whole.model.language_model.load_state_dict(truth.hf.model.state_dict())
        whole.lm_head.load_state_dict(truth.hf.lm_head.state_dict())
        folder = Path(self.folder) / architecture
        whole.save_pretrained(str(folder))
        tensors = stack_experts(load_file(folder / "model.safetensors"))
        self.assertTrue(any(key.startswith("model.visual.") for key in tensors))
        save_file({**tensors, "mtp.fc.weight": torch.ones(2, 2)}, folder / "model.safetensors")
        return folder

    def test_tied_embeddings(self):
        truth = Truth("q35", Path(self.folder) / "tied", tie_word_embeddings=True)
        self.assertNotIn("lm_head.weight", load_file(truth.folder / "model.safetensors"))
        found = truth.harness.extend([(truth.harness.new_request(), truth.sequences[2])])[0]
        self.check(found, truth.logprobs[2], "tied embeddings")


def _first(states):
    return states[0] if isinstance(states, (list, tuple, dict)) else states


def empty_batch(backend):
    return ForwardBatch.from_worker_batch(ModelWorkerBatch.idle(), torch.device("cpu"), backend)


def stack_experts(tensors):
    """Per-expert matrices as the stacked [E, 2I, H] and [E, H, I] of the other checkpoint form."""
    out, experts = {}, {}
    for name, tensor in tensors.items():
        before, marker, rest = name.partition(".experts.")
        if marker:
            index, leaf, _ = rest.split(".")
            experts.setdefault(before, {})[int(index), leaf] = tensor
        else:
            out[name] = tensor
    for before, parts in experts.items():
        count = max(index for index, _ in parts) + 1
        pairs = [torch.cat((parts[i, "gate_proj"], parts[i, "up_proj"])) for i in range(count)]
        out[f"{before}.experts.gate_up_proj"] = torch.stack(pairs)
        out[f"{before}.experts.down_proj"] = torch.stack([parts[i, "down_proj"] for i in range(count)])
    return out


if __name__ == "__main__":
    unittest.main()
