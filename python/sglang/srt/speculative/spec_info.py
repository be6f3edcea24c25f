"""The sizes of speculative decoding: how many tokens are guessed, and the kinds of step that this makes."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.model_executor.forward_batch_info import StepKind

MAX_STEPS = 8


@dataclass(frozen=True)
class SpecInfo:
    """Speculation by a chain of ``num_steps`` drafts per request and step."""

    num_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps must lie in 1..{MAX_STEPS}, got {self.num_steps}")

    @property
    def num_draft_tokens(self) -> int:
        """Rows of a request in a verify step: its newest token, and its drafts."""
        return self.num_steps + 1

    @property
    def verify(self) -> StepKind:
        """The target's step over the newest token and its drafts."""
        return StepKind("verify", self.num_draft_tokens)

    @property
    def slots_per_step(self) -> int:
        """Slots behind the committed tokens that a step needs.

        Drafts are made behind what the step accepts, up to ``num_draft_tokens`` tokens: the last draft is never run.
        """
        return max(self.num_draft_tokens, 2 * self.num_draft_tokens - 2)
