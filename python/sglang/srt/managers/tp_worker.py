"""The scheduler's interface to the model: launch a forward, then sample it, and fetch its tokens when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprobs import HostLogprobs
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.eagle_worker import EagleWorker
from sglang.srt.speculative.verify import Accepted

# From the next tokens of each request, of which -1 is not known yet.
Ends = Callable[[list[list[int]]], bool]


@dataclass(frozen=True)
class StepOutput:
    """Results of a step on the host: tokens, faults, and the requested log-probabilities.

    ``next_token_ids[i]`` are the new tokens of request i in order, usually one, and ``row_faults[i]`` a RowFault for
    each, 0 if it is sound. For a request with an unfinished prompt the id has no meaning, and RowFault.LOGITS is the
    only fault that has one. Token j of request i was sampled from row ``i * width + j``; ``logprobs`` has one entry
    per row. ``prompt_logprobs`` are blocks of prompt rows by the index of their request.
    """

    next_token_ids: list[list[int]]
    row_faults: list[list[int]]
    width: int = 1
    logprobs: HostLogprobs | None = None
    prompt_logprobs: dict[int, list[HostLogprobs]] = field(default_factory=dict)


class HostCopy:
    """An asynchronous copy of a tensor to the host, after the work that is queued already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()  # the next replay may write it
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class LaunchedStep:
    """A sampled step in flight: one copy brings all its results to the host, and ``result`` waits for it.

    ids [B] or [B, W] integer are sampled from the rows of ``output``; the first ``num_new`` [B] of each request are its
    new tokens, None for all.
    """

    def __init__(self, ids: torch.Tensor, output: LogitsProcessorOutput, num_new: torch.Tensor | None = None) -> None:
        assert output.row_faults is not None
        self._num_rows = ids.numel()
        self._width = 1 if ids.dim() == 1 else ids.shape[1]
        self._drawn, self._prompts = output.row_logprobs, output.prompt_logprobs
        blocks = [block for _, block in self._prompts] + ([] if self._drawn is None else [self._drawn])
        tensors = [ids, output.row_faults, *([] if num_new is None else [num_new])]
        self._num_integers = sum(tensor.numel() for tensor in tensors)
        logprobs = [tensor for block in blocks for tensor in block.tensors()]
        self._sizes = [tensor.numel() for tensor in logprobs]
        tensors += logprobs
        if blocks:  # float64 holds token ids exactly, next to log-probabilities
            tensors = [tensor.to(torch.float64) for tensor in tensors]
        self._copy = HostCopy(torch.cat([tensor.flatten() for tensor in tensors]))

    def result(self) -> StepOutput:
        """Wait for the one device-to-host copy of the step."""
        copied, num = self._copy.result(), self._num_rows
        integers: list[int] = copied[: self._num_integers].long().tolist()
        counts = integers[2 * num :]  # none where all rows count
        rest = copied[self._num_integers :].split(self._sizes) if self._sizes else ()
        prompts: dict[int, list[HostLogprobs]] = {}
        for index, block in self._prompts:
            size = len(block.tensors())
            prompts.setdefault(index, []).append(block.read(rest[:size]))
            rest = rest[size:]
        return StepOutput(
            next_token_ids=self._of_requests(integers[:num], counts),
            row_faults=self._of_requests(integers[num : 2 * num], counts),
            width=self._width,
            logprobs=None if self._drawn is None else self._drawn.read(rest),
            prompt_logprobs=prompts,
        )

    def _of_requests(self, rows: list[int], counts: list[int]) -> list[list[int]]:
        """``rows`` [B * W] by request, each cut to its count if there are counts."""
        width = self._width
        if counts:
            return [rows[i * width : i * width + count] for i, count in enumerate(counts)]
        return [rows[start : start + width] for start in range(0, len(rows), width)]


class LaunchedVerify:
    """A verify step in flight, without log-probabilities: ``told`` [B, 2 W + 1], see ``Accepted``."""

    def __init__(self, told: torch.Tensor) -> None:
        self._width = told.shape[1] // 2
        self._copy = HostCopy(told)

    def result(self) -> StepOutput:
        """Wait for the one device-to-host copy of the step."""
        width, rows = self._width, self._copy.result().tolist()
        return StepOutput(
            next_token_ids=[row[: row[-1]] for row in rows],
            row_faults=[row[width : width + row[-1]] for row in rows],
            width=width,
        )


class LaunchedForward:
    """A forward in flight, whose tokens are not sampled yet.

    Inputs of sampling (penalties, masks) may be computed while it runs. ``sample`` must be called before the next
    forward of requests of this batch, which reads their tokens on the device.
    """

    def __init__(self, runner: ModelRunner, batch: ModelWorkerBatch, speculator: EagleWorker | None = None) -> None:
        self._runner = runner
        self._speculator = speculator
        self._batch = batch
        # Copied before the forward is queued, so that reading them does not wait for it.
        self._drafts: HostCopy | None = None
        if batch.tells_drafts:
            assert speculator is not None
            self._drafts = HostCopy(speculator.all_drafts)
        self.step = runner.forward(batch)

    def drafts(self) -> list[list[int]]:
        """The draft tokens of each request in this step; only for a batch that ``tells_drafts``."""
        assert self._drafts is not None, "the forward was not asked for its drafts"
        drafts: list[list[int]] = self._drafts.result()[self._batch.req_pool_indices].tolist()
        return drafts

    @torch.inference_mode()
    def sample(self, info: SamplingBatchInfo, ends: Ends | None = None) -> LaunchedStep | LaunchedVerify:
        """Queue the sampling of tokens, and the drafts of the next step, without waiting for the device.

        ends: whether no request continues from these next tokens, so that nobody reads drafts; None: some may.
        """
        speculator, step = self._speculator, self.step
        if speculator is not None:
            accepted = speculator.accept(step, info)
            # The copy is queued before the drafts, so that the host does not wait for them.
            launched = self._launched(step.output, accepted)
            speculator.draft(step, accepted, info, wanted=ends is None or not ends(accepted.known_ids()))
            return launched
        sampled = self._runner.sample(step, info, self._batch)
        info.update(sampled)
        self._runner.last_token.index_copy_(0, step.req_rows, sampled.to(torch.int64))
        return LaunchedStep(sampled, step.output)

    def _launched(self, output: LogitsProcessorOutput, accepted: Accepted) -> LaunchedStep | LaunchedVerify:
        if accepted.told is None or self._batch.logprobs:
            return LaunchedStep(accepted.sampled, output, accepted.num_new)
        return LaunchedVerify(accepted.told)


class TpModelWorker:
    """Runs steps on this rank's model."""

    def __init__(self, runner: ModelRunner, speculator: EagleWorker | None = None) -> None:
        self.runner = runner
        self.speculator = speculator
        # The kind of the decode steps: each row of a request can give it a token.
        self.decode_kind: StepKind = DECODE if speculator is None else speculator.spec.verify

    def forward(self, batch: ModelWorkerBatch) -> LaunchedForward:
        """Queue the forward of ``batch`` and, without requests, its draft forwards; never waits for the device."""
        launched = LaunchedForward(self.runner, batch, self.speculator)
        if self.speculator is not None and batch.batch_size == 0:
            self.speculator.take_part(launched.step)
        return launched

    def run_step(self, batch: ModelWorkerBatch, info: SamplingBatchInfo) -> None:
        """Queue a whole step whose tokens are not needed."""
        self.forward(batch).sample(info)
