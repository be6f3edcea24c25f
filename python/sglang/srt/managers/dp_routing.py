"""Which DP rank a request goes to."""

from __future__ import annotations


class LoadBalancer:
    """Spreads requests over ``dp_size`` schedulers.

    "round_robin" uses them in turn. "total_tokens" uses the one whose unfinished requests may hold the fewest
    tokens, prompts and outputs; the lowest rank of several.
    """

    def __init__(self, method: str, dp_size: int) -> None:
        self._by_tokens = method == "total_tokens"
        self._tokens = [0] * dp_size
        self._next = 0

    def assign(self, num_tokens: int) -> int:
        """The rank for a request that may hold ``num_tokens``; ``release`` subtracts them again."""
        if self._by_tokens:
            rank = min(range(len(self._tokens)), key=self._tokens.__getitem__)
        else:
            rank = self._next
            self._next = (rank + 1) % len(self._tokens)
        self._tokens[rank] += num_tokens
        return rank

    def release(self, rank: int, num_tokens: int) -> None:
        """The request has ended."""
        self._tokens[rank] -= num_tokens
