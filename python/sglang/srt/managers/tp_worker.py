"""The scheduler's door to the model: a step is launched, and its tokens are fetched when they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass(frozen=True)
class StepOutput:
    """Ids on the host, faults of rows, and the log-probabilities that were asked for.

    ``next_token_ids`` and ``row_faults`` (a RowFault, 0 where all is sound) have one entry per request. For a request
    whose prompt is not at its end the id has no meaning, and of the faults RowFault.LOGITS alone has one.
    """

    next_token_ids: list[int]
    row_faults: list[int]
    next_token_logprobs: list[float] | None
    logits_output: LogitsProcessorOutput


class LaunchedStep:
    """A step on its way; ``result`` waits for it."""

    def __init__(self, ids: torch.Tensor, logits_output: LogitsProcessorOutput) -> None:
        faults = logits_output.row_faults
        assert faults is not None
        logprobs = logits_output.next_token_logprobs
        # One copy for ids and faults: a token id fits exactly into float64 beside a log-probability.
        rows = [ids.to(torch.float64), faults.to(torch.float64)]
        if logprobs is not None:
            rows.append(logprobs.to(torch.float64))
        packed = torch.stack(rows)
        self._logits_output = logits_output
        self._event: torch.cuda.Event | None = None
        if packed.device.type == "cpu":
            self._host = packed
        else:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> StepOutput:
        """Wait for the one device-to-host copy of the step."""
        if self._event is not None:
            self._event.synchronize()
        ids, faults, *logprobs = self._host.unbind(0)
        return StepOutput(
            next_token_ids=ids.long().tolist(),
            row_faults=faults.long().tolist(),
            next_token_logprobs=logprobs[0].tolist() if logprobs else None,
            logits_output=self._logits_output,
        )


class TpModelWorker:
    """Runs steps on this rank's model."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    @torch.inference_mode()
    def launch(self, batch: ModelWorkerBatch, sampling_info: SamplingBatchInfo) -> LaunchedStep:
        """Queue forward and sampling of ``batch``, without waiting for the device."""
        step = self.runner.forward(batch)
        drawn = self.runner.sample(step, sampling_info, batch)
        sampling_info.update(drawn)
        self.runner.last_token.index_copy_(0, step.req_rows, drawn.to(torch.int64))
        return LaunchedStep(drawn, step.output)

    def launch_idle(self, batch: ModelWorkerBatch) -> None:
        """Queue a forward without rows of this rank, which has nothing to sample."""
        self.runner.forward(batch)
