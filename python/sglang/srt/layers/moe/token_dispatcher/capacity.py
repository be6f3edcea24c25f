"""How many rows a rank may receive, in how many rounds a step runs its experts, and how many rows the experts compute.

Pure functions of what every rank knows alike (settings and the step's exchanged row counts), so that all ranks agree
without asking. They rest on one rule of the exchange: a token goes to a rank at most once, whatever its top-k.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

# Row counts that the expert kernels of a platform kind are tuned for: AITER's table has powers of two; Triton tiles
# change slowly, so finer steps waste fewer rows; torch's loop takes any count.
ROW_TIERS: dict[str, tuple[int, ...]] = {
    "hip": tuple(2**power for power in range(4, 18)),
    "cuda": (1, 2, 4, 8, *range(16, 128, 16), *range(128, 1024, 128), *range(1024, 131073, 1024)),
    "cpu": (),
}


def recv_capacity(world_size: int, limit: int, cap: int = 0) -> int:
    """Rows R of the receive buffer: ``W * min(ceil(cap / W), limit)``, as MORI rounds; cap 0 means ``W * limit``."""
    return world_size * (min(-(-cap // world_size), limit) if cap else limit)


def source_limit(world_size: int, limit: int, cap: int) -> int:
    """The most rows m that a rank may send at once where combine addresses rows by source: ``cap // W`` under a cap.

    MORI's IntraNode kernel allocates W * m rows and writes, in dispatch, the n-th row that reaches a rank to row n and,
    in combine, what rank r made of a source's row t to row ``r * m + t`` there. Both stay inside where no rank sends
    more than m rows: a token reaches a rank once, so n < W * m; r < W and t < m, so r * m + t < W * m <= cap. A cap on
    the received rows alone proves only the first. The least cap is W: one row of each rank.
    """
    return min(limit, cap // world_size) if cap else limit


def slice_of(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First and end row of the ``part``-th of ``parts`` slices of ``rows``; the last ones may be short or empty."""
    share = -(-rows // parts)
    return min(part * share, rows), min((part + 1) * share, rows)


def rows_of_ranks(rows_of_groups: Sequence[int], tp_size: int) -> tuple[int, ...]:
    """Rows that each rank dispatches, when each attention group of ``tp_size`` ranks divides its rows among them."""
    spans = (slice_of(rows, part, tp_size) for rows in rows_of_groups for part in range(tp_size))
    return tuple(end - first for first, end in spans)


@dataclass(frozen=True)
class Round:
    """One dispatch: the rows ``[first[r], end[r])`` that each rank ``r`` brings."""

    first: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(end - first for first, end in zip(self.first, self.end, strict=True))


@lru_cache(maxsize=4096)
def plan_rounds(rows_of_ranks: tuple[int, ...], capacity: int, limit: int) -> tuple[Round, ...]:
    """Cut each rank's rows into the fewest equal shares with which no rank can receive more than ``capacity`` rows.

    All tokens of a round may go to one rank, so the sum of a round over ranks is what must fit; no share exceeds
    ``limit``. No rows at all are no round. ``capacity`` must be at least one row per rank.
    """
    if capacity < len(rows_of_ranks) or limit < 1:
        raise ValueError(f"{capacity} received rows and {limit} sent ones cannot serve {len(rows_of_ranks)} ranks")
    count = -(-sum(rows_of_ranks) // capacity)
    while True:
        # The i-th share ends at i/count of the rows, so shares of a rank differ by at most one row.
        ends = [tuple(rows * i // count for rows in rows_of_ranks) for i in range(count + 1)] if count else []
        rounds = tuple(Round(first, end) for first, end in zip(ends, ends[1:]))
        if all(sum(r.rows) <= capacity and max(r.rows) <= limit for r in rounds):
            return rounds
        count += 1


def input_bound(rows_of_sources: Sequence[int], capacity: int) -> int:
    """The most rows that a rank can receive: of every other rank the real rows, of itself all, its padding included.

    Padding never travels: it goes to an expert of its own rank. In a recorded step, every rank counts in full.
    """
    return min(sum(rows_of_sources), capacity)


def input_rows(bound: int, capacity: int, tiers: Sequence[int], manual: int = 0) -> int:
    """Rows that the experts compute: ``bound`` raised to the next tier, and at most ``capacity``.

    ``manual`` (0: none) cuts below the tier, never below the bound.
    """
    index = bisect_left(tiers, bound)
    rows = min(tiers[index], capacity) if index < len(tiers) and bound else bound
    return max(bound, min(rows, manual)) if manual else rows
