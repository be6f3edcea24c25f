"""DeepSeek V4 against transformers on the same tiny checkpoint, in every way a step can be cut.

Beyond the window, beyond more entries than are chosen, and at both sides of every edge: windows, entries, pages.
"""

import tempfile
import unittest

import torch

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
LENGTHS = (1, 127, 128, 129, 255, 256, 257, 511, 700)


class TestDeepseekV4Parity(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        hf_model = save_tiny_checkpoint("dsv4", folder)
        ids = torch.randint(0, 512, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            truth = hf_model(ids).logits.log_softmax(-1)
        # Neighbours in a batch have different tokens.
        cls.prompts = [ids[i % 2, :length].tolist() for i, length in enumerate(LENGTHS)]
        cls.truth = [truth[i % 2, :length] for i, length in enumerate(LENGTHS)]
        cls.harness = ModelHarness(folder, page_size=256, num_slots=8192)

    def setUp(self):
        self.harness.reset()
        for buffer in self.harness.pools.buffers():
            buffer.fill_(float("nan"))

    def assert_close(self, rows, truth, what=""):
        self.assertEqual(rows.shape, truth.shape)
        self.assertLess((rows - truth).abs().max().item(), TOLERANCE, what)

    def start(self, heads):
        """Requests that have the first ``heads[i]`` tokens of prompt i, in one step; checked."""
        requests = [self.harness.new_request() for _ in heads]
        parts = [(request, self.prompts[i][:head]) for request, (i, head) in zip(requests, heads.items())]
        for rows, (i, head) in zip(self.harness.extend(parts), heads.items(), strict=True):
            self.assert_close(rows, self.truth[i][:head], f"first {head} tokens of prompt {i}")
        return dict(zip(heads, requests))

    def test_the_truth_is_not_flat(self):
        self.assertGreater(self.truth[-1].std().item(), 0.3)

    def test_all_lengths_at_once(self):
        self.start(dict(enumerate(LENGTHS)))

    def test_chunks(self):
        for size in (7, 64, 256):
            with self.subTest(size=size):
                self.assert_close(
                    self.harness.extend_in_chunks(self.harness.new_request(), self.prompts[-1], size), self.truth[-1]
                )

    def test_decode_across_every_edge(self):
        """A batch of unequal lengths, each of which closes entries, windows and pages on its way."""
        heads = {3: 121, 4: 249, 5: 250, 6: 251, 7: 503, 8: 690}
        requests = self.start(heads)
        for step in range(10):
            live = [i for i, head in heads.items() if head + step < LENGTHS[i]]
            tokens = [(requests[i], self.prompts[i][heads[i] + step]) for i in live]
            for i, rows in zip(live, self.harness.decode(tokens), strict=True):
                at = heads[i] + step
                self.assert_close(rows, self.truth[i][at : at + 1], f"position {at} of prompt {i}")

    def test_decode_from_the_first_token(self):
        request = self.harness.new_request()
        for position, token in enumerate(self.prompts[4][:140]):
            (rows,) = self.harness.decode([(request, token)])
            self.assert_close(rows, self.truth[4][position : position + 1], f"position {position}")

    def test_a_step_of_chunks_and_single_tokens(self):
        requests = self.start({2: 127, 4: 200, 6: 256, 8: 300})
        chunks = {2: (127, 128), 4: (200, 201), 6: (256, 257), 8: (300, 600), 7: (0, 130)}
        requests[7] = self.harness.new_request()
        parts = [(requests[i], self.prompts[i][first:last]) for i, (first, last) in chunks.items()]
        for i, rows in zip(chunks, self.harness.extend(parts, mode=ForwardMode.MIXED), strict=True):
            first, last = chunks[i]
            self.assert_close(rows, self.truth[i][first:last], f"prompt {i}")

    def test_a_step_without_requests(self):
        self.assertEqual(tuple(self.harness.idle().next_token_logits.shape), (0, 512))


if __name__ == "__main__":
    unittest.main()
