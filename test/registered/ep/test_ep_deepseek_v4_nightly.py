"""DeepSeek V4 over ranks, spread experts and attention groups: the tokens of one rank, hash-routed layers included."""

import itertools
import os
import tempfile
import unittest
from unittest import mock

import torch

from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

register_cpu_ci(est_time=240, suite="nightly-cpu", nightly=True)

GREEDY = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}
DRAWN = {**GREEDY, "temperature": 1.0, "sampling_seed": 3}
GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MODES = {
    "tensor parallel": {"tp_size": 2},
    "all-reduce": {"tp_size": 2, "ep_size": 2},
    "groups, gathered": {"tp_size": 2, "ep_size": 2, **GROUPS},
    "mori normal": {"tp_size": 2, "moe_a2a_backend": "mori"},
    "groups, mori low latency": {"tp_size": 2, "deepep_mode": "low_latency", "moe_a2a_backend": "mori", **GROUPS},
    "replicas": {"tp_size": 1, "dp_size": 2},
}
DRAFTS = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
# So few ids that drafts of an untrained layer are accepted now and then.
VOCAB = 24
LENGTHS = (1, 5, 60, 127, 130, 254, 300, 40)


class TestRanks(CustomTestCase):
    def answers(self, **settings):
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
        sizes = {"max_total_tokens": 4096, "context_length": 1024, "random_seed": 1, "skip_tokenizer_init": True}
        with Engine(model_path=self.folder, **sizes, **settings) as engine:
            alone = [engine.generate(input_ids=prompts[-2], sampling_params=GREEDY, return_logprob=True)]
            together = engine.generate(
                input_ids=prompts, sampling_params=[GREEDY, DRAWN] * 4, return_logprob=True
            )  # fmt: skip
            return alone + together, engine.get_server_info()["internal_states"]

    def test_every_mode(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(self.folder, vocab_size=VOCAB)
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            wanted, _ = self.answers()
            for (mode, settings), drafts in itertools.product(MODES.items(), ({}, DRAFTS)):
                with self.subTest(mode=mode, drafts=bool(drafts)):
                    found, states = self.answers(**settings, **drafts)
                    accepted, made = (sum(s[name] for s in states) for name in ("num_accepted_drafts", "num_drafts"))
                    self.assertTrue(0 < accepted < made if drafts else not made, (accepted, made))
                    for one, other in zip(wanted, found, strict=True):
                        self.assertEqual(one["output_ids"], other["output_ids"])
                        pairs = (reply["meta_info"]["output_token_logprobs"] for reply in (one, other))
                        for (expected, token, _), (logprob, same, _) in zip(*pairs, strict=True):
                            self.assertEqual(token, same)
                            self.assertAlmostEqual(expected, logprob, delta=1e-4)


if __name__ == "__main__":
    unittest.main()
