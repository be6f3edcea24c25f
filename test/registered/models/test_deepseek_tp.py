"""DeepSeek split over tensor-parallel ranks gives every rank the log-probabilities of transformers."""

import tempfile
import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=6, suite="stage-b-test-cpu")


def build(folder, handle, page_size=1):
    with override_tp_group(handle):
        return ModelHarness(folder, num_slots=256 if page_size == 1 else 4 * page_size, page_size=page_size)


class TestDeepseekTensorParallel(CustomTestCase):
    def check(self, name, size, length=90, page_size=1, **overrides):
        prompt = torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(size)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            hf_model = save_tiny_checkpoint(name, folder, **overrides)
            ranks = [build(folder, handle, page_size) for handle in thread_ranks(size)]

        def serve(harness):
            request = harness.new_request()
            cuts = length - 10, length - 5
            rows = harness.extend([(request, prompt[: cuts[0]])]) + harness.extend(
                [(request, prompt[cuts[0] : cuts[1]])]
            )
            return torch.cat(rows + [harness.decode([(request, token)])[0] for token in prompt[cuts[1] :]])

        found = run_ranks(serve, ranks)
        with torch.no_grad():
            truth = hf_model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for logprobs in found:
            self.assertLess((logprobs - truth).abs().max().item(), 1e-4)
            self.assertTrue(torch.equal(logprobs, found[0]), "ranks disagree")

    def test_two_ranks(self):
        self.check("dsv2", 2)
        self.check("dsv2g-k3", 2)

    def test_four_ranks_with_biases_and_an_odd_vocabulary(self):
        self.check("dsv3", 4, attention_bias=True, vocab_size=515)

    def test_compressed_attention_by_groups_of_the_output(self):
        for size in (2, 4):
            self.check("dsv4", size, length=150, page_size=256)

    def test_what_cannot_be_split_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_checkpoint("dsv3", folder)
            with self.assertRaisesRegex(ValueError, "split over 3"):
                build(folder, thread_ranks(3)[0])
            save_tiny_checkpoint("dsv4", folder)
            with self.assertRaisesRegex(ValueError, "4 groups of heads cannot be split over 8"):
                build(folder, thread_ranks(8)[0], 256)


if __name__ == "__main__":
    unittest.main()
