"""Numbers that are handed out one by one, and the error of giving back one that is not handed out."""

from __future__ import annotations


class SlotAccountingError(RuntimeError):
    """A slot, page or row was freed twice, freed in part, or never handed out."""


class SlotList:
    """Numbers ``first .. first + size - 1`` that are handed out one by one: lowest first, then last-in first-out."""

    def __init__(self, name: str, first: int, size: int):
        self.size = size
        self._name, self._first = name, first
        self.clear()

    def clear(self) -> None:
        """Take every number back, even those in use."""
        self._free = list(range(self._first + self.size - 1, self._first - 1, -1))
        self._in_use = bytearray(self._first + self.size)

    def available_size(self) -> int:
        return len(self._free)

    def is_allocated(self, slot: int) -> bool:
        return self._first <= slot < self._first + self.size and bool(self._in_use[slot])

    def alloc(self) -> int | None:
        """A number, or None when all are taken."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._in_use[slot] = 1
        return slot

    def free(self, slot: int) -> None:
        """Take a number back; raises SlotAccountingError unless it is handed out."""
        self.check(slot)
        self._in_use[slot] = 0
        self._free.append(slot)

    def check(self, slot: int) -> None:
        """Raise SlotAccountingError unless ``slot`` is handed out."""
        if not self.is_allocated(slot):
            last = self._first + self.size - 1
            raise SlotAccountingError(f"{self._name} {slot} is not handed out ({self._name}s {self._first}..{last})")
