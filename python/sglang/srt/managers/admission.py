"""The limit of the waiting queue, checked where requests arrive, before any work is done for them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from sglang.srt.managers.request_input import RequestError, overloaded
from sglang.srt.utils.limits import MAX_RETRY_AFTER_S

_RATE_WINDOW_S = 30.0
_RETRY_AFTER_UNKNOWN_S = 5
_SEQUENCES = ("sequences (prompts x n)", "--max-queued-requests")
_TOKENS = ("tokens (prompts and max_new_tokens)", "--max-queued-tokens")


class Admission:
    """Sequences that have not started yet, over all schedulers, and the most tokens that they may hold.

    A sequence counts from before its prompt is tokenized until a scheduler says that it has started, or until it is
    gone. A limit of None means no limit.
    """

    def __init__(
        self, max_requests: int | None, max_tokens: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        # Held by HTTP requests that have not said yet what they need.
        self.places: set[Place] = set()
        self._clock = clock
        # When sequences started, and how many, in the window.
        self._starts: deque[tuple[float, int]] = deque()
        self._num_started = 0

    def check(self, requests: int = 1, tokens: int = 0) -> None:
        """Raise RequestError unless so many more may wait: 503 for now, 400 if they never can."""
        for count, asked, most, what, flag in (
            (self.num_requests, requests, self.max_requests, *_SEQUENCES),
            (self.num_tokens, tokens, self.max_tokens, *_TOKENS),
        ):
            if most is None or not asked or count + asked <= most:
                continue
            self.num_refused += 1
            if asked > most:
                raise RequestError(
                    f"The call asks for {asked} {what}, but at most {most} may wait ({flag}): it can never be "
                    "accepted. Request fewer."
                )
            raise self._full(f"{count} {what} wait, {asked} more are asked for, and at most {most} may wait ({flag})")

    def check_room(self) -> None:
        """Raise RequestError (503) if not even the smallest request may wait."""
        for count, most, what, flag in (
            (self.num_requests, self.max_requests, *_SEQUENCES),
            (self.num_tokens, self.max_tokens, *_TOKENS),
        ):
            if most is not None and count >= most:
                self.num_refused += 1
                raise self._full(f"{count} {what} wait, and at most {most} may ({flag})")

    def add(self, requests: int, tokens: int) -> None:
        self.num_requests += requests
        self.num_tokens += tokens

    def remove(self, requests: int, tokens: int) -> None:
        self.num_requests -= requests
        self.num_tokens -= tokens

    def started(self, requests: int) -> None:
        """Record that so many sequences have left the queue for a scheduler's batch."""
        self._starts.append((self._clock(), requests))
        self._num_started += requests
        self._forget_old()

    def retry_after_s(self) -> int:
        """Seconds until all waiting sequences will have started, at the recent rate."""
        self._forget_old()
        if not self._num_started:
            return _RETRY_AFTER_UNKNOWN_S
        rate = self._num_started / max(1.0, self._clock() - self._starts[0][0])
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.num_requests / rate)))

    def _forget_old(self) -> None:
        while self._starts and self._starts[0][0] < self._clock() - _RATE_WINDOW_S:
            self._num_started -= self._starts.popleft()[1]

    def _full(self, found: str) -> RequestError:
        wait_s = self.retry_after_s()
        return overloaded(f"The queue is full: {found}. Try again in {wait_s} s.", wait_s)


class Place:
    """One place in the queue, until ``leave`` or the end of a with block; a second ``leave`` does nothing.

    ``aborted`` are beginnings of the ids of requests that a client aborts while the place is held.
    """

    def __init__(self, admission: Admission) -> None:
        self.aborted: set[str] = set()
        self._admission: Admission | None = admission
        admission.add(1, 0)
        admission.places.add(self)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.remove(1, 0)
            self._admission.places.remove(self)
            self._admission = None
