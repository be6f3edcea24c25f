"""Who runs next: the order of the waiting queue, and how many tokens of whom fit into a prefill step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_batch import Req

# Room kept for tokens that a running request has yet to produce is capped, or long limits would block admission.
CLIP_NEW_TOKENS = 4096
# Longest-prefix-match order costs one match per request; beyond this many the queue stays in arrival order.
LPM_MAX_QUEUE = 128


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
        """Called once per decode step that fitted."""
        self.value = max(self._floor, self.value - self._step)

    def after_retraction(self, running: Sequence[Req]) -> None:
        """Expect at least what the survivors have used so far, and some."""
        used = sum(len(req.output_ids) + 20 for req in running)
        allowed = sum(req.max_new_tokens for req in running)
        self.value = min(1.0, max(self._start, used / (allowed + 1)))

    def reset(self) -> None:
        self.value = self._start


def order_waiting(queue: list[Req], policy: str, memory: ReqMemory) -> None:
    """Sort the waiting queue in place.

    "fcfs" keeps arrival order. "lpm" puts the longest cached prefix first; ties keep arrival order. Requests that were
    retracted stay at the head under both: they have waited and have output to resume.
    """
    if policy != "lpm" or len(queue) > LPM_MAX_QUEUE:
        return
    lengths = {req.rid: memory.match(req).slot_ids.numel() for req in queue}
    queue.sort(key=lambda req: (req.num_retractions == 0, -lengths[req.rid]))


@dataclass(frozen=True)
class PrefillLimits:
    """Bounds of a prefill step; ``chunk_tokens`` None means that prompts are not cut."""

    max_prefill_tokens: int
    chunk_tokens: int | None
    max_running_requests: int


class PrefillPlanner:
    """Picks requests and chunk ends for one prefill step, and admits those that hold nothing yet."""

    def __init__(self, memory: ReqMemory, limits: PrefillLimits, running: Sequence[Req], ratio: float) -> None:
        self._memory = memory
        self._limits = limits
        self._num_running = len(running)
        self._room = memory.room() - memory.needs([self._expected_growth(req, ratio) for req in running], running=True)
        self._tokens = limits.max_prefill_tokens if limits.chunk_tokens is None else limits.chunk_tokens
        self.reqs: list[Req] = []
        self.ends: list[int] = []

    def _expected_growth(self, req: Req, ratio: float) -> int:
        return int(min(req.new_tokens_left, CLIP_NEW_TOKENS) * ratio) + self._memory.step_room

    def add_chunked(self, req: Req) -> bool:
        """Continue a request that is part-way through its prompt; False when nothing of it fits now."""
        # It must come to its end, so it may use the room that running requests have not claimed yet.
        memory = self._memory
        room = memory.room().step_tokens() - self.taken()
        growth = min(req.new_tokens_left, CLIP_NEW_TOKENS)
        needed = memory.needs([req.seq_len - req.kv_committed_len + growth + memory.step_room])
        added, taken = self._add(req, room)
        self._room -= needed.at_least(taken)
        return added

    def add_waiting(self, req: Req) -> bool:
        """Admit a waiting request; False when it must wait, with nothing changed."""
        if self._num_running + len(self.reqs) >= self._limits.max_running_requests:
            return False
        memory = self._memory
        match = memory.match(req)
        before = memory.room()
        memory.tree.inc_lock_ref(match.node)
        room = self._room - (before - memory.room())
        missing = req.seq_len - match.slot_ids.numel()
        alone = self._num_running == 0 and not self.reqs
        growth = 0 if alone else min(req.new_tokens_left, CLIP_NEW_TOKENS)
        whole = self._limits.chunk_tokens is None and missing > self._tokens and bool(self.reqs)
        if whole or not room.holds(memory.needs([missing + growth + (0 if alone else memory.step_room)])):
            memory.tree.dec_lock_ref(match.node)
            return False
        before = memory.room()
        memory.admit(req, match)
        room -= before - memory.room()
        added, taken = self._add(req, room.step_tokens())
        if not added:
            memory.release(req, cache=False)
            return False
        self._room = room - memory.needs([missing + growth + memory.step_room]).at_least(taken)
        return True

    def taken(self) -> int:
        """Tokens promised to the requests picked so far, whole pages; of each unit as many."""
        return self._memory.missing_for_extend(self.reqs, self.ends)

    def _add(self, req: Req, room: int) -> tuple[bool, int]:
        """Let a request bring as many of its tokens as there is room for; whether it can, and what the step takes for
        it of each unit, which may be more than the request needs later."""
        start, page = req.kv_committed_len, self._memory.page_size
        end = req.seq_len
        if self._limits.chunk_tokens is not None:
            end = min(end, start + self._tokens)
        if start < req.state_boundary < end:
            end = req.state_boundary
        # The free rest of the request's last page comes on top of whole pages.
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
    """Victims first: the fewest output tokens to compute again, then the longest prompt, then the youngest."""
    return sorted(running, key=lambda req: (len(req.output_ids), -len(req.origin_input_ids), -req.arrived))
