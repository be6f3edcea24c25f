"""The scheduler over a window pool that runs out: what a request reads of a window is always its own."""

from __future__ import annotations

import unittest
from collections import Counter
from unittest.mock import patch

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.window_companion import WindowCompanion
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scheduler_fakes import make, random_traffic, request
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

MODES = (
    {"window": 4},
    {"window": 5, "overlap": True},
    {"window": 20},
    {"window": 12, "chunk": None, "mixed": True},
    {"window": 9, "radix": False},
    {"window": 7, "radix": False, "mixed": True, "overlap": True},
    {"window": 8, "policy": "lpm", "overlap": True, "retract_interval": 9},
    {"window": 12, "hybrid": True},
    {"window": 10, "width": 3, "overlap": True},
    {"window": 9, "width": 4, "retract_interval": 7},
    {"window": 30, "pool": 80, "overlap": True},
)


class TestWindowTraffic(CustomTestCase):
    def test_all_modes(self) -> None:
        """The fake model keeps window rows by the device's table, and compares each that a row sees."""
        counts: Counter[str] = Counter()
        retract, evict, move, advance = (
            Scheduler._retract_until_decode_fits, WindowCompanion.evict, WindowPages.move, WindowCompanion.advance,
        )  # fmt: skip

        def counting_retract(scheduler: Scheduler, other_tokens: int) -> None:
            before = len(scheduler.running_reqs)
            retract(scheduler, other_tokens)
            counts["retracted"] += before - len(scheduler.running_reqs)

        def counting_evict(companion: WindowCompanion, num_pages: int) -> int:
            counts["tombstones"] += (count := evict(companion, num_pages))
            return count

        def counting_move(window: WindowPages, source: int, target: int) -> None:
            counts["revived"] += 1
            move(window, source, target)

        def counting_advance(companion: WindowCompanion, held, *args) -> None:  # noqa: ANN001, ANN002
            first = held.first
            advance(companion, held, *args)
            counts["passed by"] += held.first - first

        with (
            patch.object(Scheduler, "_retract_until_decode_fits", counting_retract),
            patch.object(WindowCompanion, "evict", counting_evict),
            patch.object(WindowPages, "move", counting_move),
            patch.object(WindowCompanion, "advance", counting_advance),
        ):
            for mode in MODES:
                for seed in range(4):
                    with self.subTest(mode=mode, seed=seed):
                        setup = random_traffic(self, seed, page=4, **mode)
                        counts["cached"] += setup.scheduler.metrics.num_cached_tokens
        self.assertGreater(min(counts[name] for name in ("tombstones", "revived", "cached", "passed by")), 1000, counts)
        self.assertGreater(counts["retracted"], 10, counts)

    def test_a_request_alone_needs_four_pages_however_long_it_is(self) -> None:
        for width in (1, 2):
            setup = make(page=4, window=4, width=width, chunk=64)
            setup.channel.inbox += [request("long", [*range(2, 45), *range(2, 45)], 60), request("b", [3, 3, 3], 9)]
            setup.run()
            self.assertEqual(len(setup.channel.reasons), 2)

    def test_a_conversation_goes_on_where_it_ended(self) -> None:
        """The last page of an output keeps its window, however many tokens follow it."""
        for extra in range(4):
            setup = make(page=4, window=12, chunk=64)
            setup.channel.inbox.append(request("first", [5, 6, 8, 9, 10], 20 + extra))
            setup.run()
            prompt = [5, 6, 8, 9, 10, *setup.channel.outputs["first"], 11, 12]
            setup.channel.inbox.append(request("second", prompt, 4))
            setup.run()
            known = (len(prompt) - 3) // 4 * 4
            self.assertEqual(setup.channel.cached["second"], known, f"{len(prompt)} tokens")


if __name__ == "__main__":
    unittest.main()
