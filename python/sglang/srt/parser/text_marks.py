"""Marks in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


def partial_mark(text: str, marks: Iterable[str]) -> int:
    """How many of the last characters of ``text`` may be the beginning of one of ``marks``."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
