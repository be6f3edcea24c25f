"""Amounts of the units that are allocated, compared unit by unit."""

from __future__ import annotations

from collections.abc import Mapping


class Room(dict[str, int]):
    """How many of each unit are available, or needed, by unit. Only units that can run out have an entry."""

    def __sub__(self, needed: Mapping[str, int]) -> Room:
        return Room({unit: amount - needed.get(unit, 0) for unit, amount in self.items()})

    def at_least(self, amount: int) -> Room:
        """The larger of each entry and ``amount``."""
        return Room({unit: max(own, amount) for unit, own in self.items()})

    def holds(self, needed: Mapping[str, int]) -> bool:
        """Whether no unit would run out."""
        return all(needed.get(unit, 0) <= amount for unit, amount in self.items())

    def step_tokens(self) -> int:
        """Tokens that a step can add: each of them takes one of every unit."""
        return min(self.values())
