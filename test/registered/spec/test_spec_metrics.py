"""Counters and log lines of speculation, compared with counting by hand."""

import random
import unittest

from sglang.srt.managers.scheduler_metrics import JUDGED_STEPS, LOSING_LENGTH, SchedulerMetrics
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

LOAD = {"num_running_reqs": 1, "num_queue_reqs": 0, "num_used_tokens": 5, "max_total_num_tokens": 10}


class TestAcceptance(CustomTestCase):
    def test_figures_are_those_since_the_last_line(self):
        coins, metrics = random.Random(0), SchedulerMetrics(1)
        everything: list[int] = []
        for number, end_of_turn in enumerate([metrics._log_decode, lambda load: metrics.went_idle()] * 3):
            # Later turns reach positions that the first did not.
            lengths = [coins.randint(1, 2 if number == 0 else 4) for _ in range(10)]
            for length in lengths:
                metrics.verified(3, length)
            end_of_turn(LOAD)
            everything += lengths
            self.assertAlmostEqual(metrics.spec_accept_length, sum(lengths) / 10)
            self.assertAlmostEqual(metrics.spec_accept_rate, sum(length - 1 for length in lengths) / 30)
            by_hand = [sum(length > place for length in lengths) / 10 for place in (1, 2, 3)]
            self.assertEqual(metrics.spec_accept_rate_by_position, by_hand)
        self.assertEqual(metrics.accepted_by_position, [sum(n > place for n in everything) for place in (1, 2, 3)])
        shown = metrics.spec_accept_length
        metrics.went_idle()  # nothing new: the last figures stay
        self.assertEqual(metrics.spec_accept_length, shown)


class TestLoss(CustomTestCase):
    def test_it_is_said_once_when_speculation_loses(self):
        """Decided over whole spans: 1.20 tokens per step lose, 1.30 do not, and few steps decide nothing."""
        metrics = SchedulerMetrics(1)

        def span(length, steps=JUDGED_STEPS):
            twos = round((length - 1) * steps)
            for number in range(steps):
                metrics.verified(3, 2 if number < twos else 1)

        with self.assertNoLogs("sglang.srt.managers.scheduler_metrics", "WARNING"):
            span(1.0, JUDGED_STEPS - 1)
        self.assertFalse(metrics.spec_loses)
        with self.assertLogs("sglang.srt.managers.scheduler_metrics", "WARNING") as logs:
            metrics.verified(3, 1)
            self.assertTrue(metrics.snapshot()["spec_loses"])
            for length, loses in ((1.2, True), (1.3, False), (LOSING_LENGTH, False), (1.2, True)):
                span(length)
                self.assertEqual(metrics.spec_loses, loses, length)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("1.00 tokens per step over the last 2000 steps", logs.output[0])
        self.assertIn("--speculative-num-steps 1", logs.output[0])


class TestUsage(CustomTestCase):
    def test_a_window_is_told_beside_kv(self):
        window = {"num_used_swa_tokens": 3, "swa_max_total_num_tokens": 4}
        for load, said in (
            (LOAD, "#token: 5, token usage: 0.50, gen"),
            (LOAD | window, "#token: 5, token usage: 0.50, full token usage: 0.50, swa token usage: 0.75, gen"),
        ):
            with self.assertLogs("sglang.srt.managers.scheduler_metrics", "INFO") as logs:
                SchedulerMetrics(1)._log_decode(load)
            self.assertIn(said, logs.output[0])


if __name__ == "__main__":
    unittest.main()
