"""Statistics of the receive buffers of the expert ranks: how full they get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RecvStats:
    """Counts received rows on the device; ``snapshot`` alone copies them to the host."""

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
        """Record nothing inside the block, and forget what the self-check of decode graphs recorded before it."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self.forget()

    def forget(self) -> None:
        """Forget the rows received so far: the self-check of graphs sent them, and they are no load."""
        self._since_read.zero_()

    def record_step(self, least_cap: int, rounds: int) -> None:
        """Record a step of ``rounds`` rounds; a receive cap of ``least_cap`` rows would have needed one round."""
        if self._is_paused:
            return
        self._least_cap = max(self._least_cap, least_cap)
        self._most_rounds = max(self._most_rounds, rounds)

    def record_dispatch(self, total_recv: torch.Tensor, bound: int) -> None:
        """Record a dispatch that delivered ``total_recv`` [1] int32 rows, of at most ``bound``."""
        if self._is_paused:
            return
        torch.maximum(self._since_read, total_recv, out=self._since_read)
        self._bound = max(self._bound, bound)

    def record_raised_limit(self) -> int:
        """Record that a manual input limit was below the bound, and return how often so far (0 while paused)."""
        if self._is_paused:
            return 0
        self._raised += 1
        return self._raised

    def snapshot(self) -> dict[str, Any]:
        """All counts, for /server_info and metrics; waits for the device.

        ``live``: most rows of one dispatch since the last snapshot. ``bound``: most rows that could arrive, since the
        start; replayed graphs do not update it. ``suggested_cap``: smallest SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS with
        which no recorded step would have needed a second round.
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
