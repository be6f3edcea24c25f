"""How many drafts of the embedded models are accepted while serving, compared with transformers offline."""

import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mtp_reference import load_mtp, share_accepted
from sglang.test.spec_acceptance import served_shares
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import MAX_NEW_TOKENS, heldout_questions
from sglang.test.v4_mtp_reference import load_v4_mtp, v4_share_accepted

register_cpu_ci(est_time=420, suite="nightly-cpu", nightly=True)

NUM_QUESTIONS, NUM_STEPS = 500, 3
BARS = (0.95, 0.95, 0.95)
# A tie of two drafts may fall otherwise.
NEAR = 0.02


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
        offline = *truth(path, prompts, end), 0.0
        without, cached = (
            served_shares(path, prompts, MAX_NEW_TOKENS, NUM_STEPS, disable_radix_cache=off) for off in (True, False)
        )
        named = {"offline": offline, "served": without, "served with the prefix cache": cached}
        for words, (shares, length, _) in named.items():
            print(f"{name}, {words}: {' / '.join(f'{share:.3f}' for share in shares)}, {length:.3f} tokens per step")
        for shares, *_ in (without, cached):
            for ours, theirs, bar in zip(shares, offline[0], BARS, strict=True):
                self.assertAlmostEqual(ours, theirs, delta=NEAR)
                self.assertGreaterEqual(ours, bar)

    def test_deepseek_v3(self):
        self.check("deepseek-v3-tiny", with_mtp_model)

    def test_qwen3_5(self):
        self.check("qwen3.5-moe-tiny", with_mtp_model)

    def test_deepseek_v4(self):
        self.check("deepseek-v4-tiny", with_assembled_layer)


if __name__ == "__main__":
    unittest.main()
