"""Speculation on top of a target model: after each step, draft tokens are made for the next step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

import torch

from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import backend_of
from sglang.srt.layers.attention.hybrid_linear_attn_backend import GDNBackend
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner, StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import Accepted, num_new_tokens


class Drafter(ABC):
    """Makes draft tokens. A wrong one only costs time: drafts never change the output."""

    @abstractmethod
    def propose(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> torch.Tensor:
        """Draft tokens [B, num_steps] int64 that follow the newest token of each request; ids of the vocabulary.

        Those of a request whose prompt is not complete are not read. If attention groups share experts, every group
        calls this at every step that any of them runs, and all run the same forwards, also without requests.
        """

    @abstractmethod
    def follow(self, step: StepForward, accepted: Accepted) -> object:
        """Only take in the tokens of a step, which later requests may find in the prefix cache; nobody reads drafts."""


class AcceptReplay(Protocol):
    """Samples and verifies after captured verify steps (``accept_graphs.py``); None means: do it eagerly."""

    def accept(self, step: StepForward, info: SamplingBatchInfo) -> Accepted | None: ...


class EagleWorker:
    """Verifies the draft tokens of a step, and lets ``drafter`` make those of the next."""

    def __init__(self, target: ModelRunner, spec: SpecInfo, drafter: Drafter) -> None:
        assert target.relay is not None, "a rank that drafts has buffers for lengths and draft tokens"
        self.target = target
        self.spec = spec
        self.drafter = drafter
        self.graphs: AcceptReplay | None = None
        self._relay = target.relay
        self._group = get_tp_group()

    @property
    def all_drafts(self) -> torch.Tensor:
        """Draft tokens of the next step by request row, [rows, num_steps] int64."""
        return self._relay.drafts

    def accept(self, step: StepForward, info: SamplingBatchInfo) -> Accepted:
        """Sample the tokens of ``step`` and verify its draft tokens, by a graph if there is one."""
        accepted = None if self.graphs is None else self.graphs.accept(step, info)
        if accepted is None:
            sampled = self.target.sample(step, self._sampling_info(step, info), step.batch)
            forward_batch = step.forward_batch
            if forward_batch.kind is not None:
                forward_batch = forward_batch.first(step.batch_size)
            accepted = self.judge(sampled, step.output, forward_batch)
        return accepted

    def _sampling_info(self, step: StepForward, info: SamplingBatchInfo) -> SamplingBatchInfo:
        """``info`` [B] for the rows of ``step``."""
        plain = info.is_all_greedy and info.edits is None and info.vocab_mask is None
        if plain or step.forward_batch.kind != self.spec.verify:
            return info
        return info.along_path(self._relay.drafts.index_select(0, step.req_rows))

    def judge(
        self,
        sampled: torch.Tensor,
        output: LogitsProcessorOutput,
        forward_batch: ForwardBatch,
        live: torch.Tensor | None = None,
    ) -> Accepted:
        """Count the accepted ids among ``sampled`` [rows], and store on the device what the next step starts from,
        except its draft tokens.

        Ids, counts and faults are those of rank 0. live [B] bool: requests that are no padding; None for all.
        """
        assert output.row_faults is not None
        rows, faults = forward_batch.req_pool_indices, output.row_faults.to(torch.int64)
        sampled = sampled.to(torch.int64).view(forward_batch.batch_size, -1)
        verified = forward_batch.kind == self.spec.verify
        if verified:
            num_new = num_new_tokens(sampled, self._relay.drafts.index_select(0, rows))
        else:
            num_new = torch.ones_like(sampled[:, 0])
        if self._group.size > 1:
            parts = (sampled, num_new, faults)
            told = self._group.broadcast(torch.cat([part.flatten() for part in parts]))
            ids, num_new, faults = told.split([part.numel() for part in parts])
            sampled = ids.view(sampled.shape)
        output.row_faults = faults
        newest = sampled.gather(1, num_new.unsqueeze(1) - 1).squeeze(1)
        first = forward_batch.positions.view(sampled.shape)[:, 0] if verified else forward_batch.seq_lens - 1
        committed = first + num_new
        if live is not None:  # the row of padding and its count stay 0
            newest, committed = newest * live, committed * live
        self.target.last_token.index_copy_(0, rows, newest)
        self._relay.committed.index_copy_(0, rows, committed)
        if not verified:
            return Accepted(sampled, num_new)
        if forward_batch.state_slot_ids is not None:
            counted = num_new if live is None else num_new * live
            backend_of(forward_batch, GDNBackend).update_mamba_state_after_mtp_verify(
                forward_batch.state_slot_ids, counted
            )
        return Accepted(sampled, num_new, torch.cat([sampled, faults.view(sampled.shape), num_new.unsqueeze(1)], dim=1))

    def draft(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo, wanted: bool) -> None:
        """Make the draft tokens of the next step, unless none is ``wanted``, and store them on the device."""
        if not wanted:
            self.drafter.follow(step, accepted)
            return
        # The mask is for the rows just sampled. A draft token that violates the grammar is rejected later.
        if info.vocab_mask is not None:
            info = replace(info, vocab_mask=None)
        drafts = self._group.broadcast(self.drafter.propose(step, accepted, info))
        self._relay.drafts.index_copy_(0, step.req_rows, drafts)

    @torch.inference_mode()
    def take_part(self, step: StepForward) -> None:
        """Run the draft forwards of a ``step`` without requests, which the other attention groups wait for."""
        device = self.target.device
        none = torch.empty(0, self.spec.num_draft_tokens, dtype=torch.int64, device=device)
        info = SamplingBatchInfo.from_rows([], self.target.model_config.vocab_size, device)
        self.drafter.propose(step, Accepted(none, none[:, 0]), info)
