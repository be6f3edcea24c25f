"""The scheduler's door to the model: one host batch in, token ids on the host out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass(frozen=True)
class StepOutput:
    """Ids on the host, rows whose logits could not be sampled, and the log-probabilities that were asked for.

    ``next_token_ids`` and ``invalid_rows`` have one entry a request; for a request whose prompt is not at its end the
    entry has no meaning.
    """

    next_token_ids: list[int]
    invalid_rows: list[bool]
    next_token_logprobs: list[float] | None
    logits_output: LogitsProcessorOutput


class TpModelWorker:
    """Runs a step on this rank's model."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def forward_batch_generation(self, batch: ModelWorkerBatch, sampling_info: SamplingBatchInfo) -> StepOutput:
        """Forward, sample, and copy the ids to the host (the only device-to-host hop of a step)."""
        logits_output = self.runner.forward(batch)
        ids = self.runner.sample(logits_output, sampling_info, batch)
        sampling_info.update(ids)
        logprobs = logits_output.next_token_logprobs
        invalid = logits_output.invalid_rows
        assert isinstance(invalid, torch.Tensor)
        return StepOutput(
            next_token_ids=ids.tolist(),
            invalid_rows=invalid.tolist(),
            next_token_logprobs=None if logprobs is None else logprobs.tolist(),
            logits_output=logits_output,
        )
