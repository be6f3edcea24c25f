"""Which DP rank a request goes to."""

from __future__ import annotations


class LoadBalancer:
    """Spreads requests over ``dp_size`` schedulers.

    "round_robin" takes them in turn. "total_tokens" takes the one whose unfinished requests may come to hold the fewest
    tokens, prompts and outputs; the lowest rank of several.
    """

    def __init__(self, method: str, dp_size: int) -> None:
        self._by_tokens = method == "total_tokens"
        self._tokens = [0] * dp_size
        self._next = 0

    def assign(self, num_tokens: int) -> int:
        """The rank of a request that may come to hold ``num_tokens``; ``release`` takes them back."""
        if self._by_tokens:
            rank = min(range(len(self._tokens)), key=self._tokens.__getitem__)
        else:
            rank = self._next
            self._next = (rank + 1) % len(self._tokens)
        self._tokens[rank] += num_tokens
        return rank

    def release(self, rank: int, num_tokens: int) -> None:
        """The request is over, or gone."""
        self._tokens[rank] -= num_tokens
