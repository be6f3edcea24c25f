"""Two independent computations of a layer as a fork and a join."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Side = TypeVar("Side")
Main = TypeVar("Main")


class StreamOverlap:
    """One place in a model where a side computation may run beside the main one.

    Without a side stream both run one after the other, the side first.
    """

    def __init__(self, alt_stream: torch.cuda.Stream | None = None) -> None:
        if alt_stream is not None:
            raise ValueError("computing on a side stream is not supported; build the model with alt_stream=None")

    def fork_join(self, side: Callable[[], Side], main: Callable[[], Main], num_tokens: int) -> tuple[Side, Main]:
        """Run both for a step of ``num_tokens`` rows and return (side's result, main's result).

        The two may not write one tensor nor enter one collective group.
        """
        return side(), main()
