"""Speculation beside a target model: after each step, drafts of the tokens that follow are made for the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sglang.srt.model_executor.model_runner import ModelRunner, StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import along_path, num_new_tokens


@dataclass(frozen=True)
class Accepted:
    """What a step gave: drawn [B, W] int64, of which the first ``num_new`` [B] int64 of each request are its tokens."""

    drawn: torch.Tensor
    num_new: torch.Tensor

    @property
    def last_rows(self) -> torch.Tensor:
        """Rows of the step, [B], from which the last token of each request was drawn."""
        size, width = self.drawn.shape
        return torch.arange(size, device=self.drawn.device) * width + self.num_new - 1

    @property
    def newest(self) -> torch.Tensor:
        """The last token of each request, [B]."""
        return self.drawn.gather(1, self.num_new.unsqueeze(1) - 1).squeeze(1)


class Drafter(ABC):
    """Guesses tokens. A guess costs nothing but time where it is wrong, so nothing here decides what is output."""

    @abstractmethod
    def propose(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> torch.Tensor:
        """Drafts [B, num_steps] int64 behind the newest token of each request; ids of the vocabulary.

        A request whose prompt is not at its end gets drafts that nobody reads.
        """


class EagleWorker:
    """Checks the drafts of a step, and asks ``drafter`` for those of the next."""

    def __init__(self, target: ModelRunner, spec: SpecInfo, drafter: Drafter) -> None:
        self.target = target
        self.spec = spec
        self.drafter = drafter
        target.wants_hidden = True
        target.drafts = torch.zeros(len(target.last_token), spec.num_steps, dtype=torch.int64, device=target.device)

    def sampling_info(self, step: StepForward, info: SamplingBatchInfo) -> SamplingBatchInfo:
        """``info`` [B] for the rows of ``step``."""
        return info if step.fb.kind != self.spec.verify else along_path(info, self._drafts(step))

    def accept(self, step: StepForward, drawn: torch.Tensor, info: SamplingBatchInfo) -> Accepted:
        """Judge ids [rows] drawn from a step, and make the drafts of the next one."""
        drawn = drawn.to(torch.int64).view(step.batch_size, -1)
        num_new = torch.ones_like(drawn[:, 0])
        if step.fb.kind == self.spec.verify:
            num_new = num_new_tokens(drawn, self._drafts(step))
        accepted = Accepted(drawn, num_new)
        assert self.target.drafts is not None
        drafts = self.drafter.propose(step, accepted, info)
        self.target.drafts.index_copy_(0, step.req_rows, drafts)
        return accepted

    def _drafts(self, step: StepForward) -> torch.Tensor:
        """The drafts [B, num_steps] that ``step`` ran."""
        assert self.target.drafts is not None
        return self.target.drafts.index_select(0, step.req_rows)
