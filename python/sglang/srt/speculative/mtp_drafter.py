"""Draft tokens by the checkpoint's MTP layer, eager or replayed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import DeepseekV4MultiStepBackend
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.bucket_graphs import RequestTensors
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.forward_batch_info import (
    AttentionBackendLike,
    ForwardBatch,
    ForwardMode,
    StepKind,
    StepPlan,
)
from sglang.srt.model_executor.model_runner import ModelRunner, StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.eagle_worker import Drafter
from sglang.srt.speculative.spec_info import DRAFT, SpecInfo
from sglang.srt.speculative.verify import Accepted


class DraftForward(Protocol):
    """The MTP layer as a model: ``models/draft_model.py``."""

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch, hidden: torch.Tensor
    ) -> LogitsProcessorOutput: ...


@dataclass(frozen=True)
class ChainStart(RequestTensors):
    """The layer's output at each request's last row: logits [B, V], ``hidden`` [B, H], and positions ``at`` [B]."""

    logits: torch.Tensor
    hidden: torch.Tensor
    at: torch.Tensor


@dataclass(frozen=True)
class Drafts(RequestTensors):
    """Result of a chain: ``ids`` [B, n] int64, and the layer's last rows [B, H], which the check of graphs compares."""

    ids: torch.Tensor
    hidden: torch.Tensor


class DraftReplay(Protocol):
    """Captured steps of the layer (``draft_graphs.py``); None means: run it eagerly."""

    def extend(self, step: StepForward, accepted: Accepted) -> ChainStart | None: ...

    def go_on(
        self, step: StepForward, rows: torch.Tensor, start: ChainStart, info: SamplingBatchInfo
    ) -> torch.Tensor | None: ...


class MtpDrafter(Drafter):
    """Makes draft tokens with the MTP layer, whose input at a position is the hidden row there and the next token.

    First the layer runs on the step's rows, which writes its KV for every computed token; then on its own draft
    tokens, one after the other. ``extend_backend`` plans the first run, ``decode_backend`` the others.
    shares_plans: the target's plan of an eager step is also valid for ``extend_backend``.
    """

    def __init__(
        self,
        model: DraftForward,
        target: ModelRunner,
        extend_backend: AttentionBackendLike,
        decode_backend: AttentionBackendLike | DeepseekV4MultiStepBackend,
        spec: SpecInfo,
        shares_plans: bool = False,
    ) -> None:
        self.model = model
        self.extend_backend = extend_backend
        self.decode_backend = decode_backend
        self.graphs: DraftReplay | None = None
        self._sampler = target.sampler
        self._req_to_token = target.req_to_token_pool.req_to_token
        self._padding_row = target.req_to_token_pool.padding_row
        self._num_steps = spec.num_steps
        self._shares_plans = shares_plans

    def propose(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> torch.Tensor:
        """See the base class."""
        start, rows = self.follow(step, accepted), step.req_rows
        if step.forward_batch.successors is not None:
            # A chunk before the end of a prompt has no KV locations after it: the table holds an earlier request's.
            ended = step.forward_batch.successors < 0
            rows, at = torch.where(ended, rows, self._padding_row), torch.where(ended, start.at, 0)
            start = replace(start, at=at)
        drafts = None if self.graphs is None else self.graphs.go_on(step, rows, start, info)
        if drafts is None:
            bounds, groups = step.forward_batch.seq_lens_cpu[: step.batch_size], step.batch.global_num_requests
            if start.at.device.type == "cpu":  # on a CPU the lengths can be read
                bounds = [position + 1 for position in start.at.tolist()]
            drafts = self.go_on(rows, start, info, step.forward_batch.num_token_non_padded, bounds, groups).ids
        return drafts

    def follow(self, step: StepForward, accepted: Accepted) -> ChainStart:
        """Run the layer on the step's rows; where chains start."""
        start = None
        if self.graphs is not None and step.forward_batch.kind is not None:
            start = self.graphs.extend(step, accepted)
        return self.begin(*self._extend_batch(step, accepted)) if start is None else start

    def begin(self, forward_batch: ForwardBatch, hidden: torch.Tensor) -> ChainStart:
        """Run the layer on a step whose target model gave ``hidden``; a chain starts at each of ``logits_rows``."""
        assert forward_batch.input_ids is not None and forward_batch.logits_rows is not None
        if forward_batch.attn_plan.attention is None:
            self.extend_backend.init_forward_metadata(forward_batch)
        output = self.model(forward_batch.input_ids, forward_batch.positions, forward_batch, hidden)
        assert output.hidden_states is not None
        rows = output.hidden_states.index_select(0, forward_batch.logits_rows)
        return ChainStart(
            output.next_token_logits, rows, forward_batch.positions.index_select(0, forward_batch.logits_rows)
        )

    def go_on(
        self,
        rows: torch.Tensor,
        start: ChainStart,
        info: SamplingBatchInfo,
        num_tokens: torch.Tensor,
        bounds: list[int] | None,
        groups: list[int] | None = None,
    ) -> Drafts:
        """The draft tokens of request rows ``rows`` [B]; the first is sampled from the logits of ``start``.

        num_tokens [1] int32: at least the rows that are no padding. bounds: upper bounds of the lengths before the
        draft tokens, None if the host knows none. groups: rows of each attention group, None if there is only one.
        """
        drafts, hidden, chain = [self._draw(start.logits, info, start.at)], start.hidden, None
        if self._num_steps > 1 and isinstance(self.decode_backend, DeepseekV4MultiStepBackend):
            # All steps after the first draft token as one batch: a row per request and step.
            further = self._num_steps - 1
            positions = start.at.unsqueeze(1) + torch.arange(1, further + 1, device=start.at.device)
            kind = StepKind("draft chain", further)
            chain = self._draft_batch(kind, rows, None, positions, num_tokens, _further(bounds, further))
            self.decode_backend.init_forward_metadata(chain)
        for number in range(1, self._num_steps):
            positions = start.at.unsqueeze(1) + number
            forward_batch = self._draft_batch(DRAFT, rows, drafts[-1], positions, num_tokens, _further(bounds, number))
            forward_batch.global_num_tokens_cpu = groups
            if isinstance(self.decode_backend, DeepseekV4MultiStepBackend):
                assert chain is not None
                self.decode_backend.enter_step(chain, forward_batch, number - 1)
            else:
                forward_batch.attn_backend = self.decode_backend
                self.decode_backend.init_forward_metadata(forward_batch)
            output = self.model(drafts[-1], forward_batch.positions, forward_batch, hidden)
            assert output.hidden_states is not None
            hidden = output.hidden_states
            drafts.append(self._draw(output.next_token_logits, info, forward_batch.positions))
        return Drafts(torch.stack(drafts, dim=1), hidden)

    def _extend_batch(self, step: StepForward, accepted: Accepted) -> tuple[ForwardBatch, torch.Tensor]:
        """The step's rows, each with the token that follows it, and the target's hidden rows."""
        forward_batch = step.forward_batch
        if forward_batch.kind is not None:
            forward_batch = forward_batch.first(step.batch_size)
            ids, last = accepted.sampled.flatten(), accepted.last_rows
        else:
            assert (
                forward_batch.input_ids is not None
                and forward_batch.logits_rows is not None
                and forward_batch.successors is not None
            )
            last = forward_batch.logits_rows
            ids = forward_batch.input_ids.roll(-1)
            ids[last] = torch.where(forward_batch.successors >= 0, forward_batch.successors, accepted.sampled[:, 0])
        assert step.output.hidden_states is not None
        backend = self.extend_backend
        plan = step.forward_batch.attn_plan if self._shares_plans and step.bucket is None else StepPlan()
        forward_batch = replace(
            forward_batch,
            input_ids=ids,
            logits_rows=last,
            wants_hidden=True,
            logprobs=[],
            attn_backend=backend,
            attn_plan=plan,
        )
        return forward_batch, step.output.hidden_states

    def _draft_batch(
        self,
        kind: StepKind,
        rows: torch.Tensor,
        ids: torch.Tensor | None,
        positions: torch.Tensor,
        num_tokens: torch.Tensor,
        bounds: list[int] | None,
    ) -> ForwardBatch:
        """Rows at ``positions`` [B, S] of requests, with locations of the request table; it has no backend yet."""
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            kind=kind,
            batch_size=rows.shape[0],
            input_ids=ids,
            positions=positions.flatten(),
            req_pool_indices=rows,
            seq_lens=positions[:, -1] + 1,
            # Upper bounds: only the device knows how many draft tokens were accepted.
            seq_lens_cpu=HostList() if bounds is None else bounds,
            out_cache_loc=self._req_to_token[rows.unsqueeze(1), positions].flatten().to(torch.int64),
            attn_backend=None,
            num_token_non_padded=num_tokens,
            num_token_non_padded_cpu=positions.numel(),
            wants_hidden=True,
        )

    def _draw(self, logits: torch.Tensor, info: SamplingBatchInfo, at: torch.Tensor) -> torch.Tensor:
        """Draft tokens [B] int64 of the layer's rows at positions ``at`` [B], by the random numbers of the target."""
        if not logits.shape[0]:
            return at
        # The row at position p predicts the token at p + 2: its input token is the one at p + 1.
        positions = None if info.is_all_greedy else at + 2
        return self._sampler.draft(logits, info, positions)


def _further(bounds: list[int] | None, number: int) -> list[int] | None:
    """Upper bounds of lengths ``number`` tokens later; None if there are none."""
    return None if bounds is None else [length + number for length in bounds]
