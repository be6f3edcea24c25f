"""How many drafts of the embedded models are accepted when they are served, against transformers offline."""

import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.mtp_reference import load_mtp, share_accepted
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, heldout_questions
from sglang.test.v4_mtp_reference import load_v4_mtp, v4_share_accepted

register_cpu_ci(est_time=420, suite="nightly-cpu", nightly=True)

NUM_QUESTIONS, NUM_STEPS = 500, 3
BARS = (0.7, 0.45, 0.3)
# A tie of two drafts may fall otherwise.
NEAR = 0.02


def served_shares(path: str, num_steps: int, **server_args) -> tuple[list[float], float]:
    """The share of drafts accepted at each place, those behind an answer's end not counted; and tokens per step."""
    tokenizer = Tokenizer.from_path(path)
    harness = EngineHarness(
        path, speculative_algorithm="NEXTN", speculative_num_steps=num_steps, max_running_requests=32, **server_args
    )
    scheduler = harness.scheduler
    accept, steps = scheduler._accept, []

    def watched(req, index, max_new, output):
        before = len(req.output_ids)
        fault = accept(req, index, max_new, output)
        if max_new > 1:
            steps.append((req, before, len(output.next_token_ids[index]) - 1))
        return fault

    scheduler._accept = watched
    for number, question in enumerate(heldout_questions(NUM_QUESTIONS)):
        params = SamplingParams(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
        harness.submit(f"r{number}", tokenizer.encode(question.text), params)
    harness.run()
    accepted, drafted, made = [0] * num_steps, [0] * num_steps, 0
    for req, before, hits in steps:
        left = len(req.output_ids) - before
        made += min(hits + 1, left)
        for place in range(min(num_steps, left)):
            drafted[place] += 1
            accepted[place] += hits > place
    return [a / d for a, d in zip(accepted, drafted, strict=True)], made / len(steps)


def with_mtp_model(path, prompts, end):
    return share_accepted(*load_mtp(path), prompts, end, MAX_NEW_TOKENS, NUM_STEPS)


def with_assembled_layer(path, prompts, end):
    return v4_share_accepted(*load_v4_mtp(path), prompts, end, MAX_NEW_TOKENS, NUM_STEPS)


class TestAcceptance(CustomTestCase):
    def setUp(self):
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)

    def check(self, name, truth):
        """``truth``: shares and tokens per step offline, of a folder, prompts and the id that ends an answer."""
        path = str(EMBEDDED_MODELS[name])
        tokenizer = Tokenizer.from_path(path)
        prompts = [tokenizer.encode(question.text) for question in heldout_questions(NUM_QUESTIONS)]
        (end,) = tokenizer.eos_token_ids
        offline = truth(path, prompts, end)
        without, cached = (served_shares(path, NUM_STEPS, disable_radix_cache=off) for off in (True, False))
        named = {"offline": offline, "served": without, "served with the prefix cache": cached}
        for words, (shares, length) in named.items():
            print(f"{name}, {words}: {' / '.join(f'{share:.3f}' for share in shares)}, {length:.3f} tokens per step")
        for ours, theirs in zip(without[0], offline[0], strict=True):
            self.assertAlmostEqual(ours, theirs, delta=NEAR)
        # Rows at the ends of cached prefixes were paired with what followed them elsewhere.
        for shares, _ in named.values():
            for share, bar in zip(shares, BARS, strict=True):
                self.assertGreaterEqual(share, bar)

    def test_deepseek_v3(self):
        self.check("deepseek-v3-tiny", with_mtp_model)

    def test_qwen3_5(self):
        self.check("qwen3.5-moe-tiny", with_mtp_model)

    def test_deepseek_v4(self):
        self.check("deepseek-v4-tiny", with_assembled_layer)


if __name__ == "__main__":
    unittest.main()
