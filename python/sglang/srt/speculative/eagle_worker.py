"""Speculation beside a target model: after each step, drafts of the tokens that follow are made for the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sglang.srt.layers.attention.base_attn_backend import RecurrentBackend, backend_of
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import AttentionBackendLike, ForwardBatch, ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner, StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.spec_info import DRAFT, SpecInfo
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

        A request whose prompt is not at its end gets drafts that nobody reads.
        """


class EagleWorker:
    """Checks the drafts of a step, and asks ``drafter`` for those of the next."""

    def __init__(self, target: ModelRunner, spec: SpecInfo, drafter: Drafter) -> None:
        assert target.relay is not None, "a rank that drafts has memory for lengths and drafts"
        self.target = target
        self.spec = spec
        self.drafter = drafter
        self._relay = target.relay

    def sampling_info(self, step: StepForward, info: SamplingBatchInfo) -> SamplingBatchInfo:
        """``info`` [B] for the rows of ``step``."""
        return info if step.fb.kind != self.spec.verify else info.along_path(self._drafts(step))

    def accept(self, step: StepForward, drawn: torch.Tensor) -> Accepted:
        """Judge ids [rows] drawn from a step."""
        drawn = drawn.to(torch.int64).view(step.batch_size, -1)
        if step.fb.kind != self.spec.verify:
            return Accepted(drawn, torch.ones_like(drawn[:, 0]))
        num_new = num_new_tokens(drawn, self._drafts(step))
        if step.fb.state_slot_ids is not None:
            slots = step.fb.state_slot_ids[: step.batch_size]
            backend_of(step.fb, RecurrentBackend).update_mamba_state_after_mtp_verify(slots, num_new)
        return Accepted(drawn, num_new)

    def draft(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> None:
        """Make the drafts of the next step, and leave what it begins with on the device."""
        drafts = self.drafter.propose(step, accepted, info)
        rows, fb = step.req_rows, step.fb
        committed = fb.seq_lens[: step.batch_size]
        if fb.kind == self.spec.verify:
            committed = committed - self.spec.num_draft_tokens + accepted.num_new
        self.target.last_token.index_copy_(0, rows, accepted.newest)
        self._relay.committed.index_copy_(0, rows, committed)
        self._relay.drafts.index_copy_(0, rows, drafts)

    def _drafts(self, step: StepForward) -> torch.Tensor:
        """The drafts [B, num_steps] that ``step`` ran."""
        return self._relay.drafts.index_select(0, step.req_rows)


class DraftForward(Protocol):
    """The MTP layer as a model: ``models/draft_model.py``."""

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, fb: ForwardBatch, hidden: torch.Tensor
    ) -> LogitsProcessorOutput: ...


class MtpDrafter(Drafter):
    """Drafts by the checkpoint's MTP layer, whose row of a position pairs the hidden row there with the next token.

    First the layer runs on the step's own rows, which gives it keys and values for every token that is computed; then
    on its own drafts, one after the other. ``extend_backend`` plans the first, ``decode_backend`` the rest.
    """

    def __init__(
        self,
        model: DraftForward,
        target: ModelRunner,
        extend_backend: AttentionBackendLike,
        decode_backend: AttentionBackendLike,
        spec: SpecInfo,
    ) -> None:
        self.model = model
        self.extend_backend = extend_backend
        self.decode_backend = decode_backend
        self._sampler = target.sampler
        self._req_to_token = target.req_to_token_pool.req_to_token
        self._num_steps = spec.num_steps

    def propose(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> torch.Tensor:
        """See the base class."""
        fb, last = self._extend_batch(step, accepted)
        assert fb.input_ids is not None and step.output.hidden_states is not None
        self.extend_backend.init_forward_metadata(fb)
        output = self.model(fb.input_ids, fb.positions, fb, step.output.hidden_states)
        assert output.hidden_states is not None
        hidden = output.hidden_states.index_select(0, last)
        at = fb.positions.index_select(0, last)
        # The row at position p guesses the token at p + 2: its own token is the one at p + 1.
        drafts = [self._draw(output, info, at + 2)]
        for number in range(1, self._num_steps):
            fb = self._draft_batch(step, drafts[-1], at + number, number)
            self.decode_backend.init_forward_metadata(fb)
            output = self.model(drafts[-1], fb.positions, fb, hidden)
            assert output.hidden_states is not None
            hidden = output.hidden_states
            drafts.append(self._draw(output, info, at + number + 2))
        return torch.stack(drafts, dim=1)

    def _extend_batch(self, step: StepForward, accepted: Accepted) -> tuple[ForwardBatch, torch.Tensor]:
        """The step's rows again, each with the token behind it, and the row of each request's last token."""
        fb = step.fb
        if fb.kind is not None:
            fb = fb.first(step.batch_size)
            last = accepted.last_rows
            ids = accepted.drawn.flatten()
        else:
            assert fb.input_ids is not None and fb.logits_rows is not None and fb.successors is not None
            last = fb.logits_rows
            ids = fb.input_ids.roll(-1)
            ids[last] = torch.where(fb.successors >= 0, fb.successors, accepted.newest)
        backend = self.extend_backend
        return replace(fb, input_ids=ids, logits_rows=last, wants_hidden=True, logprobs=[], attn_backend=backend), last

    def _draft_batch(self, step: StepForward, ids: torch.Tensor, positions: torch.Tensor, number: int) -> ForwardBatch:
        """One row per request, at ``positions`` [B]; slots come from the request table."""
        rows = step.req_rows
        slots = self._req_to_token[rows, positions].to(torch.int64)
        if step.fb.successors is not None:
            # A chunk before the end of a prompt has no slots behind it: the table has those of a request before.
            slots = torch.where(step.fb.successors < 0, slots, 0)
        return replace(
            step.fb,
            forward_mode=ForwardMode.DECODE,
            kind=DRAFT,
            batch_size=step.batch_size,
            input_ids=ids,
            positions=positions,
            req_pool_indices=rows,
            seq_lens=positions + 1,
            # Bounds: how many drafts were accepted is known on the device alone.
            seq_lens_cpu=[length + number for length in step.fb.seq_lens_cpu[: step.batch_size]],
            out_cache_loc=slots,
            logits_rows=None,
            wants_hidden=True,
            attn_backend=self.decode_backend,
            extend_seq_lens_cpu=None,
            extend_prefix_lens_cpu=None,
            extend_start_loc_cpu=None,
            logprobs=[],
        )

    def _draw(self, output: LogitsProcessorOutput, info: SamplingBatchInfo, positions: torch.Tensor) -> torch.Tensor:
        """One id per row [B] int64, by the coins with which the target draws at ``positions`` [B]."""
        ids: torch.Tensor = self._sampler(output, info, positions=positions)
        return ids.to(torch.int64)
