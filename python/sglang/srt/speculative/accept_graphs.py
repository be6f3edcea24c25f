"""Graphs that sample and verify after a captured verify step, so nothing between its forward and the draft is eager.

A step with penalties, a bias, a mask or log-probabilities is sampled eagerly: their inputs have no fixed size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from sglang.srt.distributed.parallel_state import get_world_group
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.bucket_graphs import Body, BucketGraphs, RequestTensors
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.model_executor.model_runner import StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.eagle_worker import EagleWorker
from sglang.srt.speculative.proven_graphs import BodyOf, capture_proven, prove_replay
from sglang.srt.speculative.spec_buffers import SpecBuffers
from sglang.srt.speculative.verify import Accepted

GREEDY_ACCEPT, SAMPLED_ACCEPT = "greedy accept", "sampled accept"


@dataclass(frozen=True)
class Verdict(RequestTensors):
    """Result of a verify step of B requests with W rows each.

    ``told`` [B, 2 W + 1] is that of ``Accepted``, with the ids ``sampled`` [B, W] and the counts ``num_new`` [B].
    """

    told: torch.Tensor
    sampled: torch.Tensor
    num_new: torch.Tensor


class AcceptGraphs:
    """Captures, checks and replays what ``worker`` does after the verify steps that its target has captured.

    One graph is for batches whose rows are all greedy, one for all others. The graphs write the inputs of the draft's
    captured steps into ``buffers``.
    """

    def __init__(self, worker: EagleWorker, buffers: SpecBuffers) -> None:
        assert worker.target.decode_graphs is not None and worker.target.relay is not None
        self._worker = worker
        self._runner = worker.target
        self._verify = worker.target.decode_graphs
        self._relay = worker.target.relay
        self._buffers = buffers
        buckets, world = self._verify.captured, get_world_group()
        self.kinds: dict[str, BucketGraphs[Verdict]] = {
            name: BucketGraphs(name, buckets, self._runner.device, world) for name in (GREEDY_ACCEPT, SAMPLED_ACCEPT)
        }

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture and check every bucket; the pools must be empty, and remain empty."""
        for name, graphs in self.kinds.items():
            capture_proven(self._runner, graphs, partial(self.body, name == GREEDY_ACCEPT), self.prove)

    def body(self, greedy: bool, bucket: int) -> Body[Verdict]:
        """Sample after the verify graph of ``bucket`` and verify, for the host, the next step and the draft."""
        runner, buffers, width = self._runner, self._buffers, self._verify.kind.rows_per_request
        forward_batch = self._verify.buffers.view(bucket, runner.attn_backend, runner.has_state, None)
        output = self._verify.output(bucket)
        assert isinstance(output, LogitsProcessorOutput)
        assert output.hidden_states is not None
        hidden, zero = output.hidden_states.view(bucket, width, -1), output.hidden_states.new_zeros(())
        kept = buffers.step_hidden[: bucket * width].view(hidden.shape)

        def body() -> Verdict:
            rows = forward_batch.req_pool_indices
            live, judged = rows != buffers.padding_row, LogitsProcessorOutput(output.next_token_logits)
            info = buffers.sampling_info(bucket, greedy)
            if not greedy:
                info = info.along_path(self._relay.drafts.index_select(0, rows))
            sampled = runner.sampler(judged, info, positions=None if greedy else forward_batch.positions + 1)
            accepted = self._worker.judge(sampled, judged, forward_batch, live)
            assert accepted.told is not None
            buffers.sampled[:bucket].copy_(accepted.sampled)
            buffers.num_new[:bucket].copy_(accepted.num_new)
            # Padding may not be finite.
            torch.where(live.view(-1, 1, 1), hidden, zero, out=kept)
            return Verdict(accepted.told, buffers.sampled[:bucket], buffers.num_new[:bucket])

        return body

    def accept(self, step: StepForward, info: SamplingBatchInfo) -> Accepted | None:
        """The result of ``step`` by a graph; None if it must be computed eagerly."""
        if step.bucket is None or info.edits is not None or info.vocab_mask is not None or step.batch.logprobs:
            return None
        graphs = self.kinds[GREEDY_ACCEPT if info.is_all_greedy else SAMPLED_ACCEPT]
        if graphs.bucket_of(step.bucket) != step.bucket:
            return None
        if not info.is_all_greedy:
            self._buffers.fill_sampling(info)
        found = graphs.run(step.bucket).first(step.batch_size)
        return Accepted(found.sampled, found.num_new, found.told, step.bucket)

    def prove(self, graphs: BucketGraphs[Verdict], body_of: BodyOf) -> None:
        """Refuse each bucket whose replay differs from the eager body, for draft tokens of which some are accepted."""
        # What the step stores for the next step and for the draft. All rows are compared: padding must be finite.
        left = (self._runner.last_token, self._relay.committed, self._buffers.step_hidden)
        prove_replay(self._runner, graphs, self._verify.kind, body_of, self._fill_at_random, left)

    def _fill_at_random(self, batch: ModelWorkerBatch, bucket: int) -> None:
        """Write the output of one verify step, the same for the same bucket, for the requests of ``batch``."""
        generator = torch.Generator().manual_seed(bucket)
        self._verify.fill(batch, bucket)
        output, size = self._verify.output(bucket), batch.batch_size
        assert isinstance(output, LogitsProcessorOutput)
        width = self._verify.kind.rows_per_request
        for tensor in output.tensors():
            tensor.fill_(math.nan)  # where padding is
            rows = torch.randn(size * width, tensor.shape[1], generator=generator)
            tensor[: size * width] = rows.to(tensor.device, tensor.dtype)
        drafts = self._relay.drafts[batch.req_pool_indices.to(self._relay.drafts.device)]
        likely = 100.0 * torch.randint(0, 3, drafts.shape, generator=generator).clamp(max=1).to(drafts.device)
        likely[0, 0] = 100.0
        logits = output.next_token_logits.view(bucket, width, -1)[:size]
        logits[:, :-1].scatter_add_(2, drafts.unsqueeze(2), likely.unsqueeze(2).to(logits.dtype))
        logits[-1, -1, -1] = math.inf  # a fault
        for tensor in (self._runner.last_token, self._relay.committed):
            tensor.zero_()
        self._buffers.forget_step()
        self._buffers.fill_sampling_at_random(size, generator)
