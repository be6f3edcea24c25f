"""Qwen3.5 split over tensor-parallel ranks, which run as threads of this process and meet at a barrier."""

import tempfile
import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=5, suite="stage-b-test-cpu")


def rank_harness(folder, rank):
    with override_tp_group(rank):
        return ModelHarness(folder, num_slots=512)


class TestQwen35TensorParallel(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())

    def check(self, name, size, **overrides):
        folder = f"{self.folder}/{name}-{size}"
        hf = save_tiny_checkpoint(name, folder, **overrides)
        generator = torch.Generator().manual_seed(size)
        first, second = (torch.randint(0, 512, (length,), generator=generator).tolist() for length in (70, 9))
        ranks = [rank_harness(folder, rank) for rank in thread_ranks(size)]

        def serve(harness):
            requests = [harness.new_request(), harness.new_request()]
            outs = harness.extend([(requests[0], first[:-1]), (requests[1], second[:-1])])
            last = harness.decode([(requests[0], first[-1]), (requests[1], second[-1])])
            return [torch.cat(parts) for parts in zip(outs, last, strict=True)]

        results = run_ranks(serve, ranks)
        for tokens, *found in zip((first, second), *results, strict=True):
            with torch.no_grad():
                expected = hf(torch.tensor([tokens])).logits[0].log_softmax(-1)
            for rank, logprobs in enumerate(found):
                worst = float((logprobs - expected).abs().max())
                self.assertLess(worst, 1e-4, f"{name}, rank {rank} of {size}, {len(tokens)} tokens")
                self.assertTrue(torch.equal(logprobs, found[0]), "ranks must agree bit for bit")

    def test_dense_over_two_ranks(self):
        self.check("q35", 2)

    def test_three_value_heads_a_key_head_over_two_ranks(self):
        self.check("q35moe-ns", 2)

    def test_more_ranks_than_key_value_heads(self):
        self.check("q35moe", 4, linear_num_key_heads=4, linear_num_value_heads=8)

    def test_heads_that_cannot_be_split_are_refused(self):
        folder = f"{self.folder}/refused"
        save_tiny_checkpoint("q35", folder)
        with self.assertRaisesRegex(ValueError, "2 linear key heads cannot be split over 4"):
            rank_harness(folder, thread_ranks(4)[0])


if __name__ == "__main__":
    unittest.main()
