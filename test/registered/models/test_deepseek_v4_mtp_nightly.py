"""DeepSeek V4 with drafts outputs what it would without, at both sides of every edge and for every accepted length."""

import tempfile
import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import difference, prompts_around, serve

register_cpu_ci(est_time=400, suite="nightly-cpu", nightly=True)

TOLERANCE = 1e-4
# Windows of the attention, entries of both ratios, and pages end among them.
LENGTHS = (1, 2, 3, 4, 5, *range(124, 133), *range(252, 261), *range(508, 517))
RULES = ("model", "right", "wrong", "right at the end", "wrong at the end", "errant")


class TestIdentity(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        save_tiny_v4_mtp(cls.folder)
        cls.prompts = prompts_around(LENGTHS)
        cls.plain, _ = serve(cls.folder, cls.prompts)

    def check(self, num_steps, rule, **options):
        found, drafter = serve(self.folder, self.prompts, num_steps, rule, self.plain, **options)
        self.assertEqual(difference(found, self.plain, TOLERANCE), "", f"{rule} drafts of {num_steps}, {options}")
        return drafter

    def test_every_rule_and_width(self):
        for num_steps in (1, 3, 7):
            for rule in RULES:
                with self.subTest(num_steps=num_steps, rule=rule):
                    drafter = self.check(num_steps, rule)
                    if rule == "errant":
                        self.assertTrue(all(drafter.num_by_length[1:]), drafter.num_by_length)

    def test_batches_of_other_sizes(self):
        for concurrency in (1, 2, 7):
            with self.subTest(concurrency=concurrency):
                self.check(3, "errant", max_running_requests=concurrency)

    def test_chunks_and_no_cache(self):
        for options in ({"chunked_prefill_size": 256}, {"disable_radix_cache": True}):
            with self.subTest(**options):
                self.check(3, "errant", **options)

    def test_a_step_wider_than_the_states_bear_is_refused(self):
        with self.assertRaisesRegex(Exception, "speculative-num-steps"):
            self.check(10, "wrong")


if __name__ == "__main__":
    unittest.main()
