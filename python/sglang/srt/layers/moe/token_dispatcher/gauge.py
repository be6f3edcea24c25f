"""How full the receive buffers of the expert ranks get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RecvGauge:
    """Counts received rows on the device and reads them only when asked, so that it costs one small kernel a dispatch.

    Shared by the layers of one dispatcher.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._since_read = torch.zeros(1, dtype=torch.int32, device=device)
        self._peak = 0
        self._bound = 0
        self._least_cap = 0
        self._most_rounds = 0
        self._raised = 0
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing counts, and what the proof of decode graphs left is forgotten."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.forget()

    def forget(self) -> None:
        """Rows received so far were those of a proof of graphs, which is not load."""
        self._since_read.zero_()

    def plan(self, least_cap: int, rounds: int) -> None:
        """A step is done in ``rounds`` rounds, and would be done in one under a receive cap of ``least_cap`` rows."""
        if self._is_paused:
            return
        self._least_cap = max(self._least_cap, least_cap)
        self._most_rounds = max(self._most_rounds, rounds)

    def add(self, total_recv: torch.Tensor, bound: int) -> None:
        """A dispatch delivered ``total_recv`` [1] rows of at most ``bound``."""
        if self._is_paused:
            return
        torch.maximum(self._since_read, total_recv, out=self._since_read)
        self._bound = max(self._bound, bound)

    def count_raised(self) -> int:
        """A manual input limit was below the bound; returns how often that was so (0 while paused)."""
        if self._is_paused:
            return 0
        self._raised += 1
        return self._raised

    def snapshot(self) -> dict[str, Any]:
        """The figures; waits for the device. ``live`` is the most rows of a dispatch since the last.

        ``bound`` is the most that could arrive, since the start: replayed graphs do not pass here.
        ``suggested_cap`` is the smallest SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS with which no step seen so far would have
        needed a second round.
        """
        live = int(self._since_read)
        self._since_read.zero_()
        self._peak = max(self._peak, live)
        return {
            "live": live,
            "peak": self._peak,
            "bound": self._bound,
            "buffer": self._capacity,
            "most_rounds": self._most_rounds,
            "suggested_cap": self._least_cap,
            "input_limit_raised": self._raised,
        }
