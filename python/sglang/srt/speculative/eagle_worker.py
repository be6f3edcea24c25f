"""Speculation beside a target model: after each step, drafts of the tokens that follow are made for the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import RecurrentBackend, backend_of
from sglang.srt.model_executor.model_runner import ModelRunner, StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import num_new_tokens


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

        A request whose prompt is not at its end gets drafts that nobody reads. Where attention groups share experts,
        every group calls it at every step that any of them runs, and all run the same forwards, also without requests.
        """


class EagleWorker:
    """Checks the drafts of a step, and asks ``drafter`` for those of the next."""

    def __init__(self, target: ModelRunner, spec: SpecInfo, drafter: Drafter) -> None:
        assert target.relay is not None, "a rank that drafts has memory for lengths and drafts"
        self.target = target
        self.spec = spec
        self.drafter = drafter
        self._relay = target.relay
        self._group = get_tp_group()

    @property
    def all_drafts(self) -> torch.Tensor:
        """Drafts of the next step by request row, [rows, num_steps] int64."""
        return self._relay.drafts

    def sampling_info(self, step: StepForward, info: SamplingBatchInfo) -> SamplingBatchInfo:
        """``info`` [B] for the rows of ``step``."""
        return info if step.fb.kind != self.spec.verify else info.along_path(self._drafts(step))

    def accept(self, step: StepForward, drawn: torch.Tensor) -> Accepted:
        """Judge ids [rows] drawn from a step; ids, counts and faults are those of rank 0."""
        drawn = drawn.to(torch.int64).view(step.batch_size, -1)
        verified = step.fb.kind == self.spec.verify
        num_new = num_new_tokens(drawn, self._drafts(step)) if verified else torch.ones_like(drawn[:, 0])
        if self._group.size > 1:
            assert step.output.row_faults is not None
            parts = (drawn, num_new, step.output.row_faults.to(torch.int64))
            told = self._group.broadcast(torch.cat([part.flatten() for part in parts]))
            ids, num_new, step.output.row_faults = told.split([part.numel() for part in parts])
            drawn = ids.view(drawn.shape)
        if verified and step.fb.state_slot_ids is not None:
            slots = step.fb.state_slot_ids[: step.batch_size]
            backend_of(step.fb, RecurrentBackend).update_mamba_state_after_mtp_verify(slots, num_new)
        return Accepted(drawn, num_new)

    def draft(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> None:
        """Make the drafts of the next step, and leave what it begins with on the device."""
        if info.vocab_mask is not None:  # of the rows just drawn; a guess may leave the form, and is not accepted then
            info = replace(info, vocab_mask=None)
        drafts = self._group.broadcast(self.drafter.propose(step, accepted, info))
        rows, fb = step.req_rows, step.fb
        committed = fb.seq_lens[: step.batch_size]
        if fb.kind == self.spec.verify:
            committed = committed - self.spec.num_draft_tokens + accepted.num_new
        self.target.last_token.index_copy_(0, rows, accepted.newest)
        self._relay.committed.index_copy_(0, rows, committed)
        self._relay.drafts.index_copy_(0, rows, drafts)

    def take_part(self, step: StepForward) -> None:
        """Run the forwards of the drafts of a ``step`` without requests, which the other attention groups wait for."""
        device = self.target.device
        none = torch.empty(0, self.spec.num_draft_tokens, dtype=torch.int64, device=device)
        info = SamplingBatchInfo.from_rows([], self.target.model_config.vocab_size, device)
        self.drafter.propose(step, Accepted(none, none[:, 0]), info)

    def _drafts(self, step: StepForward) -> torch.Tensor:
        """The drafts [B, num_steps] that ``step`` ran."""
        return self._relay.drafts.index_select(0, step.req_rows)
