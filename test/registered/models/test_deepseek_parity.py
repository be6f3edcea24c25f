"""DeepSeek V2-Lite, V2 and V3 against transformers on the same tiny checkpoints, in every way a step can be cut."""

import tempfile
import unittest

import torch

from sglang.srt.model_executor.forward_batch_info import ForwardMode, LogprobRequest
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=25, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
# Beyond the 64 tokens of pretraining, so that YaRN's stretched frequencies matter; 1 and 2 are the degenerate lengths.
LENGTHS = (150, 70, 33, 2, 1)
FORMS = {"auto": None, "absorbed": lambda new, total: False, "expanded": lambda new, total: True}


class DeepseekParity:
    """The checks; one subclass per checkpoint."""

    checkpoint = ""
    overrides: dict = {}
    page_size = 1

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        hf_model = save_tiny_checkpoint(cls.checkpoint, folder, **cls.overrides)
        generator = torch.Generator().manual_seed(11)
        cls.prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in LENGTHS]
        with torch.no_grad():
            cls.truth = [hf_model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in cls.prompts]
        cls.harness = ModelHarness(folder, page_size=cls.page_size)
        cls.auto = cls.harness.backend.use_mha

    def setUp(self):
        self.fresh(self.auto)

    def fresh(self, rule):
        """An empty pool whose rows are poison until a step writes them."""
        self.harness.reset()
        for buffer in self.harness.pools.buffers():
            buffer.fill_(float("nan"))
        self.harness.backend.use_mha = rule

    def each_form(self):
        for name, rule in FORMS.items():
            with self.subTest(form=name):
                self.fresh(rule or self.auto)
                yield [self.harness.new_request() for _ in self.prompts]

    def assert_close(self, found, which=None):
        for i, rows in zip(which or range(len(self.prompts)), found, strict=True):
            self.assertEqual(rows.shape, self.truth[i].shape)
            difference = (rows - self.truth[i]).abs().max().item()
            self.assertLess(difference, TOLERANCE, f"prompt of {LENGTHS[i]} tokens")

    def test_the_truth_is_not_flat(self):
        # Near-uniform logits would let a wrong model pass.
        self.assertGreater(self.truth[0].std().item(), 0.3)

    def test_full_prefill_of_all_prompts_at_once(self):
        for requests in self.each_form():
            self.assert_close(self.harness.extend(list(zip(requests, self.prompts))))

    def test_chunked_prefill(self):
        for size in (7, 64):
            for requests in self.each_form():
                found = [self.harness.extend_in_chunks(r, p, size) for r, p in zip(requests, self.prompts)]
                self.assert_close(found)

    def test_decode_after_prefill(self):
        for requests in self.each_form():
            which = (0, 1, 2)  # batch of unequal lengths; each decodes its second half
            cuts = [LENGTHS[i] // 2 for i in which]
            first = self.harness.extend([(requests[i], self.prompts[i][:cut]) for i, cut in zip(which, cuts)])
            rows = [[part] for part in first]
            for step in range(max(LENGTHS[i] - cut for i, cut in zip(which, cuts))):
                live = [j for j, i in enumerate(which) if cuts[j] + step < LENGTHS[i]]
                tokens = [(requests[which[j]], self.prompts[which[j]][cuts[j] + step]) for j in live]
                for j, part in zip(live, self.harness.decode(tokens)):
                    rows[j].append(part)
            self.assert_close([torch.cat(parts) for parts in rows], which)

    def test_mixed_batch(self):
        """One step with a continued chunk, a fresh prompt, and requests that bring one token."""
        for requests in self.each_form():
            heads = {0: 100, 1: 69, 2: 0, 3: 1, 4: 0}
            rows = {i: [] for i in heads}
            started = [i for i, head in heads.items() if head]
            parts = self.harness.extend([(requests[i], self.prompts[i][: heads[i]]) for i in started])
            for i, part in zip(started, parts):
                rows[i].append(part)
            chunks = [(requests[i], self.prompts[i][head:]) for i, head in heads.items()]
            for i, part in zip(heads, self.harness.extend(chunks, mode=ForwardMode.MIXED)):
                rows[i].append(part)
            if self.harness.backend.use_mha is self.auto:
                self.assertIsNotNone(self.harness.plan.attention.absorbed)
                self.assertIsNotNone(self.harness.plan.attention.expanded)
            self.assert_close([torch.cat(rows[i]) for i in heads])

    def test_very_unequal_decode_batch(self):
        """Lengths so far apart that the backend splits the batch."""
        requests = [self.harness.new_request() for _ in range(4)]
        picks = (0, 3, 0, 3)
        self.harness.extend([(r, self.prompts[i][:-1]) for r, i in zip(requests, picks)])
        found = self.harness.decode([(r, self.prompts[i][-1]) for r, i in zip(requests, picks)])
        self.assertGreater(len(self.harness.plan.attention), 1)
        for rows, i in zip(found, picks):
            self.assertLess((rows[0] - self.truth[i][-1]).abs().max().item(), TOLERANCE)

    def test_logits_processor_rows(self):
        """By default only last rows are returned; prompt log-probabilities are those of the requested rows."""
        requests = [self.harness.new_request() for _ in range(3)]
        first, second = self.prompts[0], self.prompts[1]
        wanted = LogprobRequest(input_start=3, input_target_ids=tuple(first[4:]), top_k=2, token_ids=(5, 9))
        out = self.harness.extend(
            list(zip(requests, (first, second, self.prompts[4]))), logprobs=[wanted, None, None], every_row=False
        )
        for row, i in zip(out.next_token_logits.log_softmax(-1, dtype=torch.float32), (0, 1, 4), strict=True):
            self.assertLess((row - self.truth[i][-1]).abs().max().item(), TOLERANCE)
        truth = self.truth[0][3:-1]
        scored = truth.gather(1, torch.tensor(first[4:]).unsqueeze(1)).squeeze(1)
        self.assertEqual([index for index, _ in out.prompt_logprobs], [0])
        block = out.prompt_logprobs[0][1]
        found = block.read(block.tensors())
        self.assertLess((torch.tensor(found.token) - scored).abs().max().item(), TOLERANCE)
        best = truth.topk(2)
        for row, values, ids in zip(found.top, best.values.tolist(), best.indices.tolist(), strict=True):
            self.assertEqual([i for _, i in row], ids)
            self.assertTrue(all(abs(a - b) < TOLERANCE for (a, _), b in zip(row, values)))
        for row, values in zip(found.chosen, truth[:, [5, 9]].tolist(), strict=True):
            self.assertEqual([i for _, i in row], [5, 9])
            self.assertTrue(all(abs(a - b) < TOLERANCE for (a, _), b in zip(row, values)))

    def test_idle_step(self):
        out = self.harness.idle()
        self.assertEqual(tuple(out.next_token_logits.shape), (0, 512))


class TestDeepseekV2Lite(DeepseekParity, CustomTestCase):
    checkpoint = "dsv2"


class TestDeepseekV2(DeepseekParity, CustomTestCase):
    checkpoint = "dsv2g"


class TestDeepseekV2GroupLimit(DeepseekParity, CustomTestCase):
    checkpoint = "dsv2g-k3"


class TestDeepseekV3(DeepseekParity, CustomTestCase):
    checkpoint = "dsv3"


class TestDeepseekV3Variant(DeepseekParity, CustomTestCase):
    """Half-split rotary pairs, projection biases, tied embeddings, two shared experts; pages of 16."""

    checkpoint = "dsv3"
    page_size = 16
    overrides = {"rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True, "n_shared_experts": 2}


if __name__ == "__main__":
    unittest.main()
