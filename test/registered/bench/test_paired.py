"""Ratios of paired turns, against tables and constructed samples."""

import math
import unittest
from unittest import mock

from sglang.test import paired
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.paired import paired_ratio, rounds_within
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

# 97.5 % points of Student's distribution, from a printed table, by degrees of freedom.
TABLE = {3: 3.182, 4: 2.776, 6: 2.447, 8: 2.306, 20: 2.086, 60: 2.000, 1000: 1.962}


class TestPairedRatio(CustomTestCase):
    def test_points_of_the_distribution(self):
        for free, expected in TABLE.items():
            self.assertAlmostEqual(paired._student_97_5(free) / expected, 1.0, delta=2e-3, msg=f"{free} degrees")

    def test_mean_and_interval(self):
        base, logs = [1.0, 2.0, 4.0, 0.5], [0.10, 0.20, 0.30, 0.40]
        found = paired_ratio(base, [a * math.exp(log) for a, log in zip(base, logs, strict=True)])
        # Mean 0.25, standard deviation sqrt(0.05 / 3), 4 pairs.
        half = TABLE[3] * math.sqrt(0.05 / 3) / 2
        for value, expected in ((found.mean, 0.25), (found.low, 0.25 - half), (found.high, 0.25 + half)):
            self.assertAlmostEqual(math.log(value), expected, delta=1e-3)

    def test_too_few_pairs(self):
        with self.assertRaisesRegex(ValueError, "at least 4 pairs, there are 3"):
            paired_ratio([1.0] * 3, [1.0] * 3)


class TestRoundsWithin(CustomTestCase):
    def _rounds(self, most: int, seconds: float, each: float) -> list[int]:
        clock = [0.0]
        found = []
        with mock.patch.object(paired.time, "monotonic", lambda: clock[0]):
            for number in rounds_within(most, seconds):
                found.append(number)
                clock[0] += each
        return found

    def test_all_fit(self):
        self.assertEqual(self._rounds(7, 100.0, 1.0), list(range(8)))

    def test_time_ends_them(self):
        self.assertEqual(self._rounds(50, 10.0, 1.0), list(range(10)))

    def test_an_interval_has_its_pairs(self):
        self.assertEqual(self._rounds(50, 1.0, 10.0), list(range(paired.MIN_PAIRS + 1)))


if __name__ == "__main__":
    unittest.main()
