"""Which requests run next: the order of the waiting queue, and how many tokens of each fit into a prefill step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.tree_node import MatchResult

# Cap on the room reserved for future tokens of a running request, so that large limits do not block admission.
CLIP_NEW_TOKENS = 4096
# Longest-prefix-match order costs one match per request; beyond this many the queue stays in arrival order.
LPM_MAX_QUEUE = 128
# A request waits for a step that computes at least so many of its next tokens for another one.
MIN_SHARED_TOKENS = 32


class NewTokenRatio:
    """The share of its limit that a running request is expected to use; raised by retraction, decaying otherwise.

    ``conservativeness`` scales the start value (``--schedule-conservativeness``).
    """

    START = 0.7
    FLOOR = 0.1
    DECAY_STEPS = 600

    def __init__(self, conservativeness: float) -> None:
        self._start = min(1.0, self.START * conservativeness)
        self._floor = min(self._start, self.FLOOR * conservativeness)
        self._step = (self._start - self._floor) / self.DECAY_STEPS
        self.value = self._start

    def decay(self) -> None:
        """Called once per decode step that fit into memory."""
        self.value = max(self._floor, self.value - self._step)

    def after_retraction(self, running: Sequence[Req]) -> None:
        """Raise the ratio to at least what the remaining requests have used so far, with a margin."""
        used = sum(len(req.output_ids) + 20 for req in running)
        allowed = sum(req.max_new_tokens for req in running)
        self.value = min(1.0, max(self._start, used / (allowed + 1)))

    def reset(self) -> None:
        self.value = self._start


def order_waiting(queue: list[Req], policy: str, memory: ReqMemory) -> None:
    """Sort the waiting queue in place.

    "fcfs" keeps arrival order. "lpm" puts the longest cached prefix first; ties keep arrival order. Requests that were
    retracted stay at the head with both policies, because they have waited already and have output.
    """
    if policy != "lpm" or len(queue) > LPM_MAX_QUEUE:
        return
    lengths = {req.rid: memory.match(req).slot_ids.numel() for req in queue}
    queue.sort(key=lambda req: (req.num_retractions == 0, -lengths[req.rid]))


@dataclass(frozen=True)
class PrefillLimits:
    """Limits of a prefill step; ``chunk_tokens`` None: prompts are not split."""

    max_prefill_tokens: int
    chunk_tokens: int | None
    max_running_requests: int


class PrefillPlanner:
    """Chooses requests and chunk ends for one prefill step, and admits requests that hold no memory yet.

    ``in_flight`` are requests whose prompts are being computed, and enter the prefix cache after that.
    """

    def __init__(
        self,
        memory: ReqMemory,
        limits: PrefillLimits,
        running: Sequence[Req],
        ratio: float,
        in_flight: Sequence[Req] = (),
    ) -> None:
        self._memory = memory
        self._in_flight = in_flight
        self._limits = limits
        self._num_running = len(running)
        # What running requests are expected to need yet.
        expected = [memory.with_step(int(min(req.new_tokens_left, CLIP_NEW_TOKENS) * ratio)) for req in running]
        self._room = memory.room() - memory.needs(expected, running=True)
        self._tokens = limits.max_prefill_tokens if limits.chunk_tokens is None else limits.chunk_tokens
        self.reqs: list[Req] = []
        self.ends: list[int] = []

    def add_chunked(self, req: Req) -> bool:
        """Continue a partly computed prompt; False when none of it fits now, or its last chunk must be known first."""
        if req in self._in_flight and not self._memory.may_continue(req):
            return False
        # It must be able to finish, so it may use room that is reserved for running requests.
        memory = self._memory
        room = memory.room().step_tokens() - self.taken()
        growth = min(req.new_tokens_left, CLIP_NEW_TOKENS)
        needed = memory.needs([memory.with_step(req.seq_len - req.kv_committed_len + growth)])
        added, taken = self._add(req, room)
        self._room -= needed.at_least(taken)
        return added

    def take_waiting(self, queue: list[Req]) -> list[str]:
        """Move requests from the queue into this step, in order, while they fit; their ids.

        A request stays for a later step if its next tokens are computed for another one, in this step or in the one in
        flight: it then finds them in the prefix cache. Those after it may go first.
        """
        before = len(self.reqs)
        for req in queue:
            if self.is_full:
                break
            match = self._memory.match(req)
            if not self._is_computed(req, match) and not self._add_waiting(req, match):
                break
        taken = self.reqs[before:]
        for req in taken:
            queue.remove(req)
        return [req.rid for req in taken]

    def _is_computed(self, req: Req, match: MatchResult) -> bool:
        """Whether a longer prefix than ``match`` is being computed that the request may use."""
        upto = match.slot_ids.numel() + max(MIN_SHARED_TOKENS, self._memory.page_size)
        if self._memory.tree.disable or upto > req.max_prefix_len():
            return False
        return any(req.shares(other, upto) for other in itertools.chain(self._in_flight, self.reqs))

    def _add_waiting(self, req: Req, match: MatchResult) -> bool:
        """Admit a waiting request; False, with nothing changed, when it must wait."""
        if self._num_running + len(self.reqs) >= self._limits.max_running_requests:
            return False
        memory = self._memory
        before = memory.room()
        memory.tree.inc_lock_ref(match.node)
        room = self._room - (before - memory.room())
        missing = req.seq_len - match.slot_ids.numel()
        alone = self._num_running == 0 and not self.reqs
        growth = 0 if alone else min(req.new_tokens_left, CLIP_NEW_TOKENS)
        whole = self._limits.chunk_tokens is None and missing > self._tokens and bool(self.reqs)
        if whole or not room.holds(memory.needs([missing if alone else memory.with_step(missing + growth)])):
            memory.tree.dec_lock_ref(match.node)
            return False
        before = memory.room()
        memory.admit(req, match)
        room -= before - memory.room()
        added, taken = self._add(req, room.step_tokens())
        if not added:
            memory.release(req, cache=False)
            return False
        self._room = room - memory.needs([memory.with_step(missing + growth)]).at_least(taken)
        return True

    def taken(self) -> int:
        """Tokens, in whole pages, that the requests chosen so far will take, of each unit."""
        return self._memory.missing_for_extend(self.reqs, self.ends)

    def _add(self, req: Req, room: int) -> tuple[bool, int]:
        """Add as many tokens of a request as there is room for.

        Returns whether any fit, and the tokens that the step takes of each unit, which may be more than the request
        needs later.
        """
        start, page = req.kv_committed_len, self._memory.page_size
        end = req.seq_len
        if self._limits.chunk_tokens is not None:
            end = min(end, start + self._tokens)
        if start < req.state_boundary < end:
            end = req.state_boundary
        # The free part of the request's last page can be used in addition to whole pages.
        pages = (room // page * page - self._memory.step_ahead) // page
        end = min(end, start + pages * page + -start % page)
        if end < req.seq_len:
            end -= end % page
        if end <= start:
            return False, 0
        self._tokens -= end - start
        self.reqs.append(req)
        self.ends.append(end)
        return True, self._memory.missing_for_extend([req], [end])

    @property
    def is_full(self) -> bool:
        """True when no further token may join this step."""
        return self._tokens <= 0


def retraction_order(running: Sequence[Req]) -> list[Req]:
    """Requests in the order of retraction: fewest output tokens, then longest prompt, then youngest."""
    return sorted(running, key=lambda req: (len(req.output_ids), -len(req.origin_input_ids), -req.arrived))
