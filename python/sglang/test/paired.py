"""Two variants measured alternately in one run: how many rounds fit, and the ratio of one variant to the other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_PAIRS = 4


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of the pairs' ratios, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} (95 % {self.low:.4f} .. {self.high:.4f})"


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """``other`` over ``base``, pair by pair, by Student's distribution of the logarithms.

    Raises ValueError for fewer than 4 pairs, whose interval would mean nothing.
    """
    logs = [math.log(b / a) for a, b in zip(base, other, strict=True)]
    if len(logs) < MIN_PAIRS:
        raise ValueError(f"an interval needs at least {MIN_PAIRS} pairs, there are {len(logs)}: allow more time")
    mean = statistics.fmean(logs)
    half = _student_97_5(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def _student_97_5(free: int) -> float:
    """The 97.5 % point of Student's distribution, expanded about the normal one; within 0.2 % from 3 degrees on."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**power for power, term in enumerate(terms, 1))


def rounds_within(most: int, seconds: float) -> Iterator[int]:
    """Numbers of rounds: 0, which warms up, then 1 .. ``most``, or fewer if the longest would not fit again."""
    began, longest = time.monotonic(), 0.0
    for number in range(most + 1):
        started = time.monotonic()
        if number > MIN_PAIRS and started + longest > began + seconds:
            return
        yield number
        longest = max(longest, time.monotonic() - started)
