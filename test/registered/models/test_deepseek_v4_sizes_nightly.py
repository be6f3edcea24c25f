"""DeepSeek V4 at the head sizes of real models over thousands of tokens, and in bfloat16, against transformers."""

import tempfile
import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=120, suite="nightly-cpu", nightly=True)

TOLERANCE = 1e-4


class TestSizes(CustomTestCase):
    def test_heads_of_512_and_more_entries_than_are_chosen(self):
        """2,300 tokens have 575 entries, of which 512 are chosen."""
        with tempfile.TemporaryDirectory() as folder:
            hf_model = save_tiny_checkpoint("dsv4-k", folder)
            ids = torch.randint(0, 512, (2300,), generator=torch.Generator().manual_seed(3)).tolist()
            with torch.no_grad():
                truth = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            harness = ModelHarness(folder, page_size=256, num_slots=8192)
        self.assertGreater(truth.std().item(), 0.3)
        request = harness.new_request()
        rows = list(harness.extend([(request, ids[:2050])]))
        rows += list(harness.extend([(request, ids[2050:2280])]))
        rows += [harness.decode([(request, token)])[0] for token in ids[2280:]]
        self.assertLess((torch.cat(rows) - truth).abs().max().item(), TOLERANCE)
        chunked = harness.extend_in_chunks(harness.new_request(), ids, 256)
        self.assertLess((chunked - truth).abs().max().item(), TOLERANCE)

    def test_bfloat16_is_as_near_as_transformers_own(self):
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            hf_model = save_tiny_checkpoint("dsv4", folder, swiglu_limit=10.0)
            ids = torch.randint(0, 512, (400,), generator=torch.Generator().manual_seed(3)).tolist()
            truth = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            short = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            theirs = short(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            harness = ModelHarness(folder, page_size=256, num_slots=2048, dtype="bfloat16")
        (ours,) = harness.extend([(harness.new_request(), ids)])
        errors = [(found - truth).abs().mean().item() for found in (ours, theirs)]
        self.assertLess(errors[0], 1.2 * errors[1], errors)
        same = [(found.argmax(-1) == truth.argmax(-1)).float().mean().item() for found in (ours, theirs)]
        self.assertGreater(same[0], same[1] - 0.03, same)


if __name__ == "__main__":
    unittest.main()
