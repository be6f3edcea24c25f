"""The sizes of speculative decoding: how many tokens are drafted, and the kinds of step that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.model_executor.forward_batch_info import StepKind

# The draft model's step over one draft token per request.
DRAFT = StepKind("draft", 1)


@dataclass(frozen=True)
class SpecInfo:
    """Speculation with a chain of ``num_steps`` draft tokens per request and step."""

    num_steps: int

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")

    @property
    def num_draft_tokens(self) -> int:
        """Rows of a request in a verify step: its newest token, and its draft tokens."""
        return self.num_steps + 1

    @property
    def verify(self) -> StepKind:
        """The target model's step over the newest token and the draft tokens after it."""
        return StepKind("verify", self.num_draft_tokens, self.slots_ahead)

    @classmethod
    def of(cls, num_steps: int | None) -> SpecInfo | None:
        """From the resolved ``speculative_num_steps``; None without speculation."""
        return None if num_steps is None else cls(num_steps)

    @property
    def slots_ahead(self) -> int:
        """KV locations that a step needs after its rows: of all draft tokens but the last, which is never run."""
        return self.num_steps - 1

    @property
    def slots_per_step(self) -> int:
        """KV locations of a request that a step needs, from its first row on."""
        return self.num_draft_tokens + self.slots_ahead
