"""The scheduler's door to the model: a forward is launched, then sampled, and its tokens are fetched when needed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprobs import HostLogprobs
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.eagle_worker import EagleWorker
from sglang.srt.speculative.verify import Accepted


@dataclass(frozen=True)
class StepOutput:
    """What a step gave its requests, on the host: tokens, faults, and the log-probabilities that were asked for.

    ``next_token_ids[i]`` are the new tokens of request i in order, usually one, and ``row_faults[i]`` a RowFault of
    each, 0 where all is sound. For a request whose prompt is not at its end the id has no meaning, and of the faults
    RowFault.LOGITS alone has one. Token j of request i was drawn from row ``i * width + j``, of which ``logprobs`` has
    one entry per row; ``prompt_logprobs`` are blocks of prompt rows by the index of their request.
    """

    next_token_ids: list[list[int]]
    row_faults: list[list[int]]
    width: int = 1
    logprobs: HostLogprobs | None = None
    prompt_logprobs: dict[int, list[HostLogprobs]] = field(default_factory=dict)


class HostCopy:
    """A tensor on its way to the host, behind what was queued before."""

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
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class LaunchedStep:
    """A step on its way: all that it tells the host comes by one copy, for which ``result`` waits.

    ids [B] or [B, W] integer are drawn from the rows of ``output``; of each request the first ``num_new`` [B] are its
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
        beside = [tensor for block in blocks for tensor in block.tensors()]
        self._sizes = [tensor.numel() for tensor in beside]
        tensors += beside
        if blocks:  # float64 holds token ids exactly, next to log-probabilities
            tensors = [tensor.to(torch.float64) for tensor in tensors]
        self._copy = HostCopy(torch.cat([tensor.flatten() for tensor in tensors]))

    def result(self) -> StepOutput:
        """Wait for the one device-to-host copy of the step."""
        told, num = self._copy.result(), self._num_rows
        integers: list[int] = told[: self._num_integers].long().tolist()
        counts = integers[2 * num :]  # none where all rows count
        rest = told[self._num_integers :].split(self._sizes) if self._sizes else ()
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
        """``rows`` [B * W] by request, each cut to its count where there are counts."""
        width = self._width
        if counts:
            return [rows[i * width : i * width + count] for i, count in enumerate(counts)]
        return [rows[start : start + width] for start in range(0, len(rows), width)]


class LaunchedVerify:
    """A verify step on its way, of which nobody wants log-probabilities: ``told`` [B, 2 W + 1], see ``Accepted``."""

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
    """A forward on its way, whose tokens are not sampled yet.

    What sampling depends on (penalties, masks) may be made while it runs. ``sample`` must come before the next forward
    of requests of this batch, which takes their tokens from the device.
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
        self._step = runner.forward(batch)

    def drafts(self) -> list[list[int]]:
        """The drafts that each request brings; only of a batch that ``tells_drafts``."""
        assert self._drafts is not None, "the forward was not asked for its drafts"
        told: list[list[int]] = self._drafts.result()[self._batch.req_pool_indices].tolist()
        return told

    @property
    def output(self) -> LogitsProcessorOutput:
        """What the forward gives."""
        return self._step.output

    @torch.inference_mode()
    def sample(self, info: SamplingBatchInfo) -> LaunchedStep | LaunchedVerify:
        """Queue the choice of tokens, and of drafts for the next step, without waiting for the device."""
        speculator, step = self._speculator, self._step
        if speculator is not None:
            accepted = speculator.accept(step, info)
            # On its way before the drafts are made, which the host does not wait for.
            launched = self._launched(step.output, accepted)
            speculator.draft(step, accepted, info)
            return launched
        drawn = self._runner.sample(self._step, info, self._batch)
        info.update(drawn)
        self._runner.last_token.index_copy_(0, self._step.req_rows, drawn.to(torch.int64))
        return LaunchedStep(drawn, self._step.output)

    def _launched(self, output: LogitsProcessorOutput, accepted: Accepted) -> LaunchedStep | LaunchedVerify:
        if accepted.told is None or self._batch.logprobs:
            return LaunchedStep(accepted.drawn, output, accepted.num_new)
        return LaunchedVerify(accepted.told)

    @torch.inference_mode()
    def take_part(self, speculator: EagleWorker) -> None:
        """Queue what drafts of the other attention groups need of a step without requests."""
        speculator.take_part(self._step)


class TpModelWorker:
    """Runs steps on this rank's model."""

    def __init__(self, runner: ModelRunner, speculator: EagleWorker | None = None) -> None:
        self.runner = runner
        self.speculator = speculator
        # The step by which requests go on: as many of its rows as each request brings can give it a token.
        self.decode_kind: StepKind = DECODE if speculator is None else speculator.spec.verify

    def forward(self, batch: ModelWorkerBatch) -> LaunchedForward:
        """Queue the forward of ``batch``, without waiting for the device.

        One without requests is never sampled, so all forwards of its drafts are queued too.
        """
        launched = LaunchedForward(self.runner, batch, self.speculator)
        if self.speculator is not None and batch.batch_size == 0:
            launched.take_part(self.speculator)
        return launched

    def run_step(self, batch: ModelWorkerBatch, info: SamplingBatchInfo) -> None:
        """Queue all of a step whose tokens nobody wants."""
        self.forward(batch).sample(info)
