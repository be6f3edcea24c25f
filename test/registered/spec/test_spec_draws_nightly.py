"""Samples with speculation have the distribution of samples without it; coupled drafts are accepted more often."""

import itertools
import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.verify import num_new_tokens
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=180, suite="nightly-cpu", nightly=True)

NUM_DRAWS, VOCAB, PROMPT_LEN = 20_000, 12, 5
FILTERS = ({}, {"top_k": 5}, {"top_p": 0.85}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9, "min_p": 0.02})
TEMPERATURES = (0.5, 1.0, 2.0)


class Texts:
    """Sequences whose next token depends on the last one: a table of logits, and a draft's table that is near it."""

    def __init__(self, num_steps, params, first_seed):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator) * 1.5
        self.draft_table = self.table + torch.randn(VOCAB, VOCAB, generator=generator) * 0.5
        self.num_steps, self.sampler = num_steps, Sampler()
        rows = [SamplingRow(SamplingParams(**params), first_seed + i, (), ()) for i in range(NUM_DRAWS)]
        self.info = SamplingBatchInfo.from_rows(rows, VOCAB, torch.device("cpu"))
        self.lengths = torch.zeros(num_steps + 2, dtype=torch.int64)

    def draw(self, table, last, info, positions):
        return self.sampler(LogitsProcessorOutput(table[last]), info, positions=positions).to(torch.int64)

    def plain(self, number):
        """Tokens sampled one by one: [NUM_DRAWS, number]."""
        last, tokens = torch.zeros(NUM_DRAWS, dtype=torch.int64), []
        for place in range(number):
            last = self.draw(self.table, last, self.info, torch.full_like(last, PROMPT_LEN + place))
            tokens.append(last)
        return torch.stack(tokens, 1)

    def verified(self, number):
        """The same by verify steps: drafts by the random numbers of their positions; the accepted tokens."""
        width = self.num_steps + 1
        tokens = torch.zeros(NUM_DRAWS, number + 2 * width, dtype=torch.int64)
        done = torch.zeros(NUM_DRAWS, dtype=torch.int64)
        last = torch.zeros(NUM_DRAWS, dtype=torch.int64)
        while int(done.min()) < number:
            guess, drafts = last, []
            for step in range(self.num_steps):
                guess = self.draw(self.draft_table, guess, self.info, PROMPT_LEN + done + step)
                drafts.append(guess)
            drafts = torch.stack(drafts, 1)
            rows = torch.cat([last[:, None], drafts], 1).flatten()
            positions = (PROMPT_LEN + done[:, None] + torch.arange(width)).flatten()
            drawn = self.draw(self.table, rows, self.info.along_path(drafts), positions).view(-1, width)
            num_new = num_new_tokens(drawn, drafts)
            self.lengths += torch.bincount(num_new, minlength=width + 1)
            room = done < number
            for place in range(width):
                taken = (room & (place < num_new)).nonzero().flatten()
                tokens[taken, done[taken] + place] = drawn[taken, place]
            last = torch.where(room, drawn.gather(1, num_new[:, None] - 1)[:, 0], last)
            done = torch.where(room, done + num_new, done)
        return tokens[:, :number]


def p_value(one, other):
    """P-value of Pearson's test that two samples of tokens [N, k] have one distribution; rare cells are merged."""
    powers = VOCAB ** torch.arange(one.shape[1])
    counts = torch.stack(
        [torch.bincount((part * powers).sum(1), minlength=VOCAB ** one.shape[1]) for part in (one, other)]
    )
    rare = counts.sum(0) < 10
    cells = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], 1)
    cells = cells[:, cells.sum(0) > 0].double()
    expected = cells.sum(0) / 2  # the samples are of one size
    statistic = ((cells - expected) ** 2 / expected).sum()
    freedom = torch.tensor((cells.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


class TestDistribution(CustomTestCase):
    def test_chi_square(self):
        found = {}
        for number, (length, warmth, filters) in enumerate(itertools.product((1, 3), TEMPERATURES, FILTERS)):
            params = {"temperature": warmth, **filters}
            # No seed twice: the same seeds would give the same tokens, and show nothing.
            seeds = 2 * number * NUM_DRAWS
            speculating = Texts(3, params, seeds)
            one, other = speculating.verified(length), Texts(3, params, seeds + NUM_DRAWS).plain(length)
            self.assertGreater(int(speculating.lengths[1]), 0)
            self.assertGreater(int(speculating.lengths[2:].sum()), 0)
            found[(length, warmth, *filters)] = p_value(one, other)
        low = {case: p for case, p in found.items() if p <= 0.01}
        print(f"p above 0.01 in {len(found) - len(low)} of {len(found)}, least {min(found.values()):.4f}; below: {low}")
        self.assertEqual(len(found), 30)
        self.assertGreaterEqual(len(found) - len(low), 28)

    def test_one_seed_gives_one_text(self):
        texts = Texts(3, {"temperature": 1.0, "top_p": 0.9}, 7)
        self.assertTrue(torch.equal(texts.verified(6), texts.plain(6)))

    def test_a_bias_is_seen(self):
        """The test notices if one draft in a hundred is accepted unchecked."""
        params = {"temperature": 1.0}
        one, other = Texts(1, params, 0).plain(1), Texts(1, params, NUM_DRAWS)
        biased = other.plain(1)
        at = torch.arange(0, NUM_DRAWS, 20)
        biased[at, 0] = other.draft_table[0].argmin()
        self.assertLess(p_value(one, biased), 1e-6)


class TestCoupledDrafts(CustomTestCase):
    """Tokens per step at temperature 0.7: drafts sampled with the target's random numbers, over greedy drafts."""

    def lengths(self, path, greedy):
        """Verify steps and their tokens of each request; output continues after its end, where choice is left."""
        tokenizer = Tokenizer.from_path(path)
        harness = EngineHarness(
            path, speculative_algorithm="NEXTN", speculative_num_steps=3, max_running_requests=64,
            disable_radix_cache=True,
        )  # fmt: skip
        if greedy:
            drafter = harness.worker.speculator.drafter
            propose = drafter.propose

            def most_likely(step, accepted, info):
                rows = [SamplingRow(SamplingParams(temperature=0.0), 0, (), ())] * step.batch_size
                vocab = harness.model_config.vocab_size
                return propose(step, accepted, SamplingBatchInfo.from_rows(rows, vocab, torch.device("cpu")))

            drafter.propose = most_likely
        steps = {}
        accept = harness.scheduler._accept

        def watched(req, index, max_new, output):
            before = len(req.output_ids)
            fault = accept(req, index, max_new, output)
            if max_new > 1:
                count = steps.setdefault(req.rid, [0, 0])
                count[0] += 1
                count[1] += len(req.output_ids) - before
            return fault

        harness.scheduler._accept = watched
        for number, question in enumerate(heldout_questions(200)):
            params = SamplingParams(temperature=0.7, max_new_tokens=40, ignore_eos=True, sampling_seed=number)
            harness.submit(f"r{number}", tokenizer.encode(question.text), params)
        results = harness.run()
        counts = torch.tensor([steps[f"r{number}"] for number in range(200)], dtype=torch.float64)
        return counts, {rid: result.output_ids for rid, result in results.items()}

    def check(self, name, bar):
        path = str(EMBEDDED_MODELS[name])
        (coupled, answers), (greedy, same) = (self.lengths(path, greedy) for greedy in (False, True))
        self.assertEqual(answers, same)
        # Requests are drawn again and again, each with both of its runs.
        drawn = torch.randint(0, 200, (2000, 200), generator=torch.Generator().manual_seed(0))

        def ratio(rows):
            ours, theirs = coupled[rows].sum(-2), greedy[rows].sum(-2)
            return (ours[..., 1] / ours[..., 0]) / (theirs[..., 1] / theirs[..., 0])

        low, high = torch.quantile(ratio(drawn), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        lengths = [float(counts[:, 1].sum() / counts[:, 0].sum()) for counts in (coupled, greedy)]
        print(f"{name}: {lengths[0]:.3f} tokens per step, {lengths[1]:.3f} by argmax; ratio {low:.3f} to {high:.3f}")
        self.assertGreater(low, bar)

    def test_deepseek_v3(self):
        self.check("deepseek-v3-tiny", 1.0)

    def test_qwen3_5(self):
        # Its next token is all but certain (0.04 nats): no coupling could gain more than a thousandth.
        self.check("qwen3.5-moe-tiny", 0.98)


if __name__ == "__main__":
    torch.set_num_threads(1)
    unittest.main()
